"""The page of `minigemma explore`: requests, answers, and refusal of requests from other pages."""

import json
import shutil
import subprocess
import threading
from base64 import b64decode, b64encode
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from support.small_models import EYES, SEEING

import minigemma as mg
from minigemma.cli.explore import Explorer
from minigemma.cli.random_weights import random_model

SPECIAL = {"image_token": 262_144, "start_token": 255_999, "end_token": 256_000}  # ids of Gemma 3's tokenizer


@pytest.fixture(scope="module")
def server(demo_file):
    with running(mg.load(demo_file)) as made:
        yield made


@pytest.fixture(scope="module")
def seeing(demo_file):
    """A model with a vision tower, random weights, and the tokenizer of the demo."""
    tokenizer = mg.load(demo_file).tokenizer
    config = replace(SEEING, vocab=262_208, vision=replace(EYES, **SPECIAL))
    model = random_model(config, "f32")
    model.tokenizer = tokenizer
    with running(model) as made:
        yield made


@contextmanager
def running(model):
    with Explorer(model, 0) as made:
        made.answer({"text": "a"})  # compiles the kernels
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def picture(width, height):
    """A picture of one color as a data URL, short enough for a command line."""
    file = BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def ask(server, method="POST", body=None, **headers):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=300)
    connection.request(method, "/", json.dumps(body) if body is not None else None, headers)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_the_page_loads_nothing_from_elsewhere(server):
    status, page = ask(server, "GET")
    assert status == 200 and b"<!doctype html>" in page
    assert b"http://" not in page and b"https://" not in page and b"src=" not in page


def test_a_run_its_views_and_a_silent_head(server):
    text = "The red fox met a grey owl near the old mill. Next morning the red fox met a grey owl near the old"
    _, reply = ask(server, body={"text": text})
    run = json.loads(reply)
    assert run["tokens"][:3] == ["<bos>", "The", " red"] and run["next"][0][0] == " mill"
    views = {"lens": {}, "attention": {"layer": 11}, "next": {"temperature": 0.5, "top_k": 3}}
    got = {show: json.loads(ask(server, body={"show": show, **more})[1])[show] for show, more in views.items()}
    assert len(got["lens"]) == 18 and len(got["attention"]) == 4 and len(got["next"]) == 3
    _, reply = ask(server, body={"text": text, "silenced": [[11, 2]]})
    assert dict(json.loads(reply)["next"]).get(" mill", 0) < 0.5 * dict(run["next"])[" mill"]
    _, reply = ask(server, body={"show": "whole", "temperature": 1.0})
    assert json.loads(reply)["next"] == run["next"]


@pytest.mark.parametrize(
    "body, problem",
    [
        ({"text": "word " * 500}, "128 can be shown"),
        ({"text": "a", "silenced": [[40, 0]]}, "no head 0 in layer 40"),
        ({"show": "weights"}, "cannot be shown"),
        ({"show": "attention", "layer": 99}, "has no attention"),
        ({"show": "next", "temperature": -1}, "temperature is -1"),
        ({"show": "channels", "layer": 0}, "layer 0 is not recurrent"),
        ({"text": "a", "image": "data:image/png;base64,AAAA"}, "has no vision tower"),
        ([1], "JSON object"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(server, body, problem):
    status, reply = ask(server, body=body)
    assert status == 200 and problem in json.loads(reply)["error"]


def test_an_image_and_its_crops_are_shown_as_squares(seeing):
    run = json.loads(ask(seeing, body={"text": "a", "image": picture(600, 280), "crops": True})[1])
    n = EYES.tokens
    assert len(run["pictures"]) == len(run["images"]) == 3 and run["patches"] == EYES.grid and run["image_tokens"] == n
    square = Image.open(BytesIO(b64decode(run["pictures"][0].partition(",")[2])))
    assert square.size == (EYES.side, EYES.side)
    shown = json.loads(ask(seeing, body={"show": "images", "layer": 2, "token": 0})[1])["images"]
    assert np.shape(shown) == (3, SEEING.heads, n) and np.abs(shown).max() == 0, "<bos> comes before the images"
    assert len(json.loads(ask(seeing, body={"text": "a"})[1])["pictures"]) == 0
    for wrong in ("data:image/png;base64,AAAA", "data:image/png;base64,%", "picture.png", 5):
        assert "image" in json.loads(ask(seeing, body={"text": "a", "image": wrong})[1])["error"]


def test_other_sites_get_nothing(server):
    assert ask(server, "GET", Host="evil.example:80")[0] == 404
    assert ask(server, body={"text": "a"}, Host="evil.example:80")[0] == 400
    assert ask(server, body={"text": "a"}, **{"Sec-Fetch-Site": "cross-site"})[0] == 400
    assert server.server_address[0] == "127.0.0.1"


def browsed(server, view):
    """The page as a browser has made it from a link to a view."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
    url = f"http://127.0.0.1:{server.server_port}/#{view}"
    return subprocess.run(["chromium", *flags, url], capture_output=True, text=True, timeout=120).stdout


@pytest.mark.oracle  # a browser is no part of [test]
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_the_run_and_what_a_silent_head_changes(server):
    page = browsed(server, "layer=11&silence=11.2")
    assert page.count('class="token"') == 25 and page.count("<canvas") == 4
    assert "silent: layer 11 head 2" in page and "head 2 is silent" in page
    assert '<b style="width: 9' in page  # the outline: what "mill" had with all heads
    assert 'id="error" role="status"></span>' in page


@pytest.mark.oracle  # a browser is no part of [test]
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_what_the_model_sees_of_an_image(seeing):
    page = browsed(seeing, "layer=2&crops&image=" + quote(picture(520, 256), safe=""))
    assert "the whole picture" in page and "crop 2" in page and "4 tokens of an image" in page
    assert "sees 4 × 4 patches of each square; every 2 × 2 become one of 2 × 2 tokens" in page
    assert page.count('class="square"') == 3 and "% of the attention" in page
    assert 'id="error" role="status"></span>' in page


def test_the_page_is_part_of_the_package():
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text("utf-8")
    assert "cli/explore.html" in setup
