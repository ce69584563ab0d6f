"""The page of `export.py --page` in a headless Chromium, driven through its debugging pipe."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager, suppress

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
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"]


@contextmanager
def served(folder):
    """The address at which the folder is served, as by `python -m http.server`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        log_message = lambda *arguments: None  # noqa: E731

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def opened(url, profile, size=(960, 1000)):
    """Opens `url` in Chromium; gives a function `call(method, **parameters)` of the page's DevTools protocol."""
    (read_here, written), (read, write_here) = os.pipe(), os.pipe()  # Chromium reads descriptor 3, writes to 4
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "about:blank"]
    wrapped = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{written}', "bash", *command]  # sh takes one digit
    browser = subprocess.Popen(wrapped, pass_fds=(read, written), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(read), os.close(written)
    try:
        with os.fdopen(read_here, "rb") as answers, os.fdopen(write_here, "wb") as questions:

            def call(method, session=None, **parameters):
                call.number += 1
                message = {"id": call.number, "method": method, "params": parameters}
                message |= {"sessionId": session} if session else {}
                questions.write(json.dumps(message).encode() + b"\0")
                questions.flush()
                while (answer := receive()).get("id") != call.number:
                    pass  # events
                if "error" in answer:
                    raise ConnectionError(answer["error"]["message"])
                return answer["result"]

            def receive():
                text = bytearray()
                while (byte := answers.read(1)) != b"\0":
                    assert byte, "Chromium ended"
                    text += byte
                return json.loads(text)

            call.number = 0
            target = call("Target.createTarget", url=url)["targetId"]
            session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            yield functools.partial(call, session=session)
            call("Browser.close")
            browser.wait(20)
    finally:
        browser.kill()
        browser.wait()


def evaluate(call, expression):
    """The value of a JavaScript expression on the page, awaited where it is a promise."""
    answer = call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")


def until(call, expression):
    """Waits until a JavaScript expression holds."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(ConnectionError):  # between two documents there is no page to ask
            if evaluate(call, expression):
                return
        time.sleep(0.05)
    raise AssertionError(f"never came: {expression}; the page says {evaluate(call, 'document.body.innerText')}")


def canvas(call, name):
    """What the canvas shows, uint8 `[H, W, 4]`."""
    script = f"(() => {{ const c = document.getElementById('{name}');"
    script += " return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; })()"
    height, width, data = evaluate(call, script)
    return np.array(data, dtype=np.uint8).reshape(height, width, 4)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """onnxruntime-web, as npm's package holds it."""
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    for name, content in (page.find_runtime() or pytest.skip("npm cannot fetch onnxruntime-web")).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
@needs_onnx
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("classes, channels, sigmas, images", [(3, 1, [40.0], 30), (0, 3, [80.0, 2.0], 100)])
def test_the_page_draws_what_pytorch_draws(tmp_path, runtime, classes, channels, sigmas, images):
    net = tiny_unet(label_dim=classes, img_channels=channels)
    about = "8x8 pixels, grey · 3 classes · 1 network evaluation per image · trained for 7 steps"
    if not classes:
        about = "8x8 pixels, colour · 2 network evaluations per image · trained for 7 steps"
    buttons = [f"class {label}" for label in range(classes)] or ["draw"]
    generator, folder = write_generator(tmp_path / "x.pt", net, sigmas=sigmas), tmp_path / "page"
    exported(generator, "--page", folder, "--ort", runtime)
    assert {path.name for path in folder.iterdir()} == {"generator.onnx", *(path.name for path in page.files(folder))}

    noise, labels = class_noise(range(net.label_dim) or [0], 2, (net.config["img_channels"], 8, 8), seed=3)
    draw = torch.Generator().manual_seed(4)
    levels = [noise, *(torch.randn(noise.shape, generator=draw) for _ in sigmas[1:])]
    with torch.no_grad():
        expected = few_step_sampler(net, noise, labels, sigmas, torch.Generator().manual_seed(4))
    expected = to_uint8(expected).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()

    texts = "[...document.querySelectorAll('%s')].map((element) => element.textContent)"
    with served(folder) as url, opened(url, tmp_path / "profile") as call:
        until(call, "Boolean(window.page)")
        evaluate(call, "page.ready")  # the first sample and the grid have been drawn
        assert evaluate(call, "document.getElementById('about').textContent") == about
        assert evaluate(call, "document.querySelectorAll('#grid canvas').length") == images
        assert f"{images} of {images} images, " in evaluate(call, "document.getElementById('pace').textContent")
        assert evaluate(call, texts % "#grid span") == (buttons if net.label_dim else [])

        for index, label in enumerate(labels.tolist()):  # floats pass through JSON bit for bit
            given = json.dumps([level[index].flatten().tolist() for level in levels])
            image = f"document.getElementById('image'), {given}.map((z) => Float32Array.from(z)), {label}"
            assert evaluate(call, f"page.draw({image})") > 0  # milliseconds
            drawn = canvas(call, "image")
            np.testing.assert_allclose(drawn[..., :3].astype(int), expected[index], atol=1)
            assert (drawn[..., 3] == 255).all() and drawn[..., 0].std() > 3

        # a click draws a new sample; the slider walks from its noise to another
        assert evaluate(call, texts % "#classes button") == buttons
        before = canvas(call, "to")
        evaluate(call, "document.querySelector('#classes button:last-child').click()")
        until(call, "document.querySelector('#classes button:last-child').getAttribute('aria-pressed') === 'true'")
        until(call, "page.idle()")
        caption = evaluate(call, "document.getElementById('caption').textContent")
        assert caption.endswith(" ms") and caption.startswith("class 2 · " if net.label_dim else "")
        assert (canvas(call, "to") != before).any() and (canvas(call, "to") != canvas(call, "from")).any()
        for place, end in ((0.5, None), (1, "to"), (0, "from")):
            evaluate(call, f"(() => {{ slider.value = {place}; slider.dispatchEvent(new Event('input')); }})()")
            until(call, "page.idle()")
            image = canvas(call, "image").astype(int)
            differences = {name: np.abs(image - canvas(call, name)).max() for name in ("from", "to")}
            assert min(differences.values()) > 1 if end is None else differences[end] <= 1


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_walk_keeps_to_the_sphere(tmp_path):
    """A quarter of a circle from one axis to the other: (cos, sin) of t pi/2, at the length of both."""
    source = page.TEMPLATE.read_text()
    function = source[source.index("function slerp") :].split("\n}\n")[0] + "\n}"
    script = f"{function}; console.log(JSON.stringify([0, 0.25, 0.5, 1].map((t) => slerp([3, 0], [0, 3], t))))"
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    angles = np.pi / 2 * np.array([0, 0.25, 0.5, 1])
    expected = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-12)


def test_the_runtime_comes_from_a_folder_from_npm_or_from_its_public_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # without npm
    assert page.find_runtime() is None
    page.write(tmp_path, {"class_names": ["</script>"]}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator.json", "index.html"]
    facts = json.loads((tmp_path / "generator.json").read_text())
    assert facts == {"class_names": ["</script>"], "runtime": page.PUBLIC}
    assert f"the page loads it from {page.PUBLIC}" in capsys.readouterr().out

    (tmp_path / "dist").mkdir()
    for name in page.RUNTIME:
        with pytest.raises(UserError, match=f"--ort {tmp_path}: needs {page.RUNTIME[0]}"):
            page.find_runtime(tmp_path)
        (tmp_path / "dist" / name).write_bytes(name.encode())
    content = {name: name.encode() for name in page.RUNTIME}
    assert page.find_runtime(tmp_path) == page.find_runtime(tmp_path / "dist") == content
    page.write(tmp_path, {}, content)
    assert json.loads((tmp_path / "generator.json").read_text()) == {"runtime": "./"}
    assert all((tmp_path / name).read_bytes() == name.encode() for name in page.RUNTIME)
