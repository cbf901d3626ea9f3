"""The page of `minigemma explore`: requests, answers, and refusal of requests from other pages."""

import json
import shutil
import subprocess
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest

import minigemma as mg
from minigemma.cli.explore import Explorer


@pytest.fixture(scope="module")
def server(demo_file):
    with Explorer(mg.load(demo_file), 0) as made:
        made.answer({"text": "a"})  # compiles the kernels
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


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
        ([1], "JSON object"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(server, body, problem):
    status, reply = ask(server, body=body)
    assert status == 200 and problem in json.loads(reply)["error"]


def test_other_sites_get_nothing(server):
    assert ask(server, "GET", Host="evil.example:80")[0] == 404
    assert ask(server, body={"text": "a"}, Host="evil.example:80")[0] == 400
    assert ask(server, body={"text": "a"}, **{"Sec-Fetch-Site": "cross-site"})[0] == 400
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.oracle  # a browser is no part of [test]
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_the_run_and_what_a_silent_head_changes(server):
    url = f"http://127.0.0.1:{server.server_port}/#layer=11&silence=11.2"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
    page = subprocess.run(["chromium", *flags, url], capture_output=True, text=True, timeout=120).stdout
    assert page.count('class="token"') == 25 and page.count("<canvas") == 4
    assert "silent: layer 11 head 2" in page and "head 2 is silent" in page
    assert '<b style="width: 9' in page  # the outline: what "mill" had with all heads
    assert 'id="error" role="status"></span>' in page


def test_the_page_is_part_of_the_package():
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text("utf-8")
    assert "cli/explore.html" in setup
