"""The page of `export.py --page` in a headless Chromium: a script after its own uses it, and sends what it saw."""

import functools
import http.server
import json
import queue
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from test_export import exported, needs_onnx, write_generator

from extras import page
from sampling import class_noise, few_step_sampler
from support.images import to_uint8
from support.script import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
SCRIPT = """<script type="module">
const find = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => find(selector).map((element) => element.textContent);
const shown = (canvas) => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
const idle = async () => { do await new Promise((done) => setTimeout(done, 20)); while (!page.idle()); };
const { image, from, to, slider } = window; // elements by their id

async function look() {
  await page.ready; // the first sample and the grid have been drawn
  const seen = { tiles: find("#grid canvas").length, names: texts("#grid span"), buttons: texts("#classes button") };
  Object.assign(seen, { drawn: [], walk: [], before: shown(to) });
  for (const [noise, label] of GIVEN) {
    await page.draw(image, noise.map((z) => Float32Array.from(z)), label);
    seen.drawn.push(shown(image));
  }
  find("#classes button").at(-1).click();
  await idle();
  for (slider.value of [0, 0.5, 1]) {
    slider.dispatchEvent(new Event("input"));
    await idle();
    seen.walk.push(shown(image));
  }
  const quarter = [0, 0.25, 0.5, 1].map((t) => page.slerp([3, 0], [0, 3], t));
  return { ...seen, quarter, ends: [from, to].map(shown), texts: ["#about", "#pace", "#caption"].flatMap(texts) };
}
const seen = await look().catch((error) => ({ error: String(error) }));
fetch("seen", { method: "POST", body: JSON.stringify(seen) });
</script>"""


class Server(http.server.SimpleHTTPRequestHandler):
    seen = queue.Queue()

    def do_POST(self):
        self.seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def look(folder, profile, given):
    """What `SCRIPT` sees on the page in `folder`, where it draws the images of the pairs (noise, label) in `given`."""
    script = SCRIPT.replace("GIVEN", json.dumps(given))  # floats pass through JSON bit for bit
    (folder / "test.html").write_text((folder / "index.html").read_text() + script)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/test.html"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", url]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return Server.seen.get(timeout=120)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()


@pytest.mark.slow
@needs_onnx
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("classes, channels, sigmas", [(3, 1, [40.0]), (0, 3, [80.0, 2.0])])
def test_the_page_draws_what_pytorch_draws(tmp_path, classes, channels, sigmas):
    net, folder = tiny_unet(label_dim=classes, img_channels=channels), tmp_path / "page"
    exported(write_generator(tmp_path / "x.pt", net, sigmas=sigmas), "--page", folder)
    if not (folder / page.RUNTIME[0]).exists():
        pytest.skip("npm cannot fetch onnxruntime-web")
    assert {path.name for path in folder.iterdir()} == {"generator.onnx", *(path.name for path in page.files(folder))}

    noise, labels = class_noise(range(classes), 2, (channels, 8, 8), seed=3)
    draw = torch.Generator().manual_seed(4)
    levels = torch.stack([noise, *(torch.randn(noise.shape, generator=draw) for _ in sigmas[1:])], dim=1)
    with torch.no_grad():
        expected = few_step_sampler(net, noise, labels, sigmas, torch.Generator().manual_seed(4))
    expected = to_uint8(expected).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    seen = look(folder, tmp_path / "profile", list(zip(levels.flatten(2).tolist(), labels.tolist(), strict=True)))
    assert "error" not in seen, seen
    drawn, ends, walk, before = (
        np.array(seen[key]).reshape(-1, 8, 8, 4) for key in ("drawn", "ends", "walk", "before")
    )
    np.testing.assert_allclose(drawn[..., :3], expected, atol=1)
    assert (drawn[..., 3] == 255).all() and drawn[..., 0].std(axis=(1, 2)).min() > 3

    about, pace, caption = seen["texts"]
    names, tiles = [f"class {label}" for label in range(classes)], 10 * (classes or 10)
    assert seen["names"] == names and seen["buttons"] == (names or ["draw"])
    assert seen["tiles"] == tiles and f"{tiles} of {tiles} images, " in pace
    colour = "grey · 3 classes · 1 network evaluation" if classes else "colour · 2 network evaluations"
    assert about == f"8x8 pixels, {colour} per image · trained for 7 steps"
    assert caption.endswith(" ms") and caption.startswith("class 2 · " if classes else "")

    # a click draws a new sample; the slider walks from its noise to another, along the sphere
    apart = np.abs(walk[:, None] - ends).max(axis=(2, 3, 4))  # [place on the walk, end]
    assert apart[0, 0] <= 1 and apart[2, 1] <= 1 and min(apart[0, 1], *apart[1]) > 1 and (ends[1] != before).any()
    angles = np.pi / 2 * np.array([0, 0.25, 0.5, 1])
    np.testing.assert_allclose(seen["quarter"], 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1), atol=1e-12)


def test_the_runtime_comes_from_a_folder_from_npm_or_from_its_public_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # without npm
    assert page.find_runtime() is None
    page.write(tmp_path, {"class_names": ["</script>"]}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator.json", "index.html"]
    facts = json.loads((tmp_path / "generator.json").read_text())
    assert facts == {"class_names": ["</script>"], "runtime": page.PUBLIC}
    assert f"the page loads it from {page.PUBLIC}" in capsys.readouterr().out

    content = {name: name.encode() for name in page.RUNTIME}
    (tmp_path / "dist").mkdir()
    for name in page.RUNTIME:
        with pytest.raises(UserError, match=f"--ort {tmp_path}: needs {page.RUNTIME[0]}"):
            page.find_runtime(tmp_path)
        (tmp_path / "dist" / name).write_bytes(content[name])
    assert page.find_runtime(tmp_path) == page.find_runtime(tmp_path / "dist") == content
    page.write(tmp_path, {}, content)
    assert json.loads((tmp_path / "generator.json").read_text()) == {"runtime": "./"}
    assert all((tmp_path / name).read_bytes() == content[name] for name in page.RUNTIME)
