#!/usr/bin/env bash
# Trains a one-step generator of digits on Linux or macOS with Python 3.10+ and bash: installs into .venv, trains a teacher, distils it,
# generates images, and compares the two. About 8 to 15 minutes on two CPU cores, without installation. Finished trainings
# are skipped.
set -euo pipefail
cd "$(dirname "$0")"
log=./log/checkpoints

if [ -x .venv/bin/python ]; then
    echo "== .venv exists: reused"
else
    echo "== making .venv"
    "${PYTHON:-python3}" -m venv .venv
fi
echo "== installing requirements.txt (installed packages are skipped)"
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt

precision=fp32
if .venv/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    precision=tf32
elif grep -qE "avx512_bf16|amx_bf16" /proc/cpuinfo 2> /dev/null; then
    precision=bf16 # this CPU trains 1.4 times as fast in it; others would be slower
fi
echo "== training in $precision"

stage() { # stage NAME FOLDER FINAL_CHECKPOINT COMMAND...: skipped if that checkpoint is in the folder, resumed if others are
    echo "== $1"
    if [ -e "$2/$3" ]; then
        echo "   skipped: $2/$3 exists (delete $2 to train again)"
    elif compgen -G "$2/*_checkpoint_step_*.pt" > /dev/null; then
        .venv/bin/python "${@:4}" --resume_from_checkpoint latest
    else
        .venv/bin/python "${@:4}"
    fi
}
stage "1. teacher" $log/mnist_teacher teacher_final.pt train_teacher.py --config configs/mnist0.yaml --precision $precision --no-wandb
stage "2. DMD2" $log/mnist_dmd2 dmd2_final.pt train_dmd2.py --config configs/mnist1.yaml --precision $precision --no-wandb
echo "== 3. images"
.venv/bin/python generate.py --checkpoint $log/mnist_dmd2/dmd2_final.pt --output_dir ./generated/mnist
echo "== 4. teacher and one-step student compared"
.venv/bin/python evaluate.py --checkpoint $log/mnist_dmd2/dmd2_final.pt --teacher_checkpoint $log/mnist_teacher/teacher_final.pt \
    --features classifier --num_samples 2000
echo
echo "Pictures:"
echo "  ./generated/mnist/overview.png             the student's digits, one network evaluation per image"
echo "  $log/mnist_dmd2/comparison.png    teacher and student from the same noise, row by row"
echo "  $log/mnist_dmd2/diversity.png     64 images of one class: real digits, teacher, student"
echo "  $log/mnist_dmd2/samples/          teacher and student during training"
