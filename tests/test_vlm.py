"""Vision-language rewards: servers that answer and that do not, what replies are worth, and whole runs over them."""

import base64
import io
import itertools
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from functools import partial

import numpy as np
import pytest
from chat_server import after, body, dripping, endless, failing, hanging_up, respond, say, serving, silent, well
from PIL import Image
from small_bert import write_encoder
from small_run import SMALL
from test_run import flags

from ddpo_jax import data, metrics, rewards, words
from ddpo_jax.errors import UserError
from ddpo_jax.main import main
from ddpo_jax.rewards import chat, vlm
from ddpo_jax.rewards.chat import Message, Reply
from ddpo_jax.types import Prompts

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No proxy, a key, and retries that do not wait long."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TEST_VLM_KEY", KEY)
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.02)


def settings_for(url, **changes):
    settings = chat.Settings(
        url=url,
        model="seer",
        key="TEST_VLM_KEY",
        concurrency=8,
        timeout=1.0,
        retries=3,
        max_tokens=16,
        deadline=2.0,
    )
    return settings._replace(**changes)


def messages(count):
    return [Message(f"question {i}", b"jpeg") for i in range(count)]


def ask(behave, count=3, **changes):
    """The replies, the requests that came, and the seconds it took."""
    with serving(behave) as server:
        begin = time.monotonic()
        replies = chat.ask(settings_for(server.url, **changes), messages(count))
        return replies, server, time.monotonic() - begin


def make_images(b, seed=0):
    return np.random.default_rng(seed).random((b, 16, 12, 3), dtype=np.float32)


def make_prompts(texts, metadata=()):
    b = len(texts)
    return Prompts(tuple(texts), np.zeros((b, 4), np.int32), np.arange(b), tuple(metadata) or ({},) * b)


echo = well(lambda request: request.text)


# The client


def test_a_request_is_as_the_protocol_has_it():
    with serving(echo) as server:
        (reply,) = chat.ask(settings_for(server.url + "/"), [Message("what is it?", b"\xff\xd8")])
    assert reply == Reply("what is it?", "")
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "seer",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9g="}},
                    {"type": "text", "text": "what is it?"},
                ],
            }
        ],
        "max_tokens": 16,
        "temperature": 0,
    }


def test_replies_keep_the_order_whichever_comes_first():
    def late_first(handler, request, closing):
        number = int(request.text.split()[-1])
        after(0.02 * (12 - number), echo)(handler, request, closing)

    replies, _, _ = ask(late_first, count=12)
    assert [reply.text for reply in replies] == [f"question {i}" for i in range(12)]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_requests_run_at_once_and_no_more(concurrency):
    together = threading.Barrier(concurrency)

    def wait(handler, request, closing):
        together.wait(20)
        echo(handler, request, closing)

    replies, server, _ = ask(wait, count=8, concurrency=concurrency, deadline=30.0, timeout=30.0)
    assert all(reply.text for reply in replies)
    assert server.most[0] == concurrency


GARBAGE = {
    "no JSON": (b"<html>\x1b[31mnot\na chat</html>", r"not JSON: status 200: '<html>\\x1b\[31mnot\\na chat</html>'"),
    "not UTF-8": (b"\xff\xfe{}", "not JSON: status 200"),
    "deep": (b"[" * 200_000, "not JSON: status 200"),
    "no choices": (b'{"choices": []}', "no choices"),
    "a list": (b"[1, 2]", "no choices"),
    "no text": (say(None), "the content is no text"),
    "parts": (say([{"type": "text", "text": "hello"}]), "the content is no text"),
    "blank": (say(" \n"), "an empty answer"),
    "nothing": (b"", "not JSON: status 200: ''"),
    "large": (say("a" * 2_000_000), "a body of more than 1000000 bytes"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_reply_that_cannot_be_read_is_missing_and_shown(name):
    garbage, message = GARBAGE[name]
    replies, server, seconds = ask(body(garbage))
    assert seconds < 15 and len(server.requests) == 3
    for reply in replies:
        assert reply.text is None and re.search(message, reply.why)
        assert len(reply.why) < 300 and "\n" not in reply.why


def test_a_compressed_body_is_not_unpacked():
    replies, server, _ = ask(body(b"\x1f\x8b\x08", Content_Encoding="gzip"), count=1)
    assert server.requests[0].headers["Accept-Encoding"] == "identity"
    assert "a compressed body" in replies[0].why


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(status):
    replies, server, _ = ask(failing(2, body(b"busy", status), echo))
    assert [reply.text for reply in replies] == [f"question {i}" for i in range(3)]
    assert len(server.requests) == 9


def test_retries_come_to_an_end():
    replies, server, seconds = ask(body(b'{"error": "out of memory"}', 500), retries=2)
    assert len(server.requests) == 9 and seconds < 15
    assert {reply.why for reply in replies} == {'status 500: \'{"error": "out of memory"}\''}


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 422])
def test_what_will_not_pass_is_not_tried_again(status):
    replies, server, _ = ask(body(b"no such model", status, Location="http://127.0.0.1:9/"))
    assert len(server.requests) == 3
    assert {reply.why for reply in replies} == {f"status {status}: 'no such model'"}


def test_retry_after_is_kept():
    replies, server, seconds = ask(failing(1, body(b"slow down", 429, Retry_After="0.7"), echo), count=1, deadline=5.0)
    assert replies[0].text and len(server.requests) == 2
    assert 0.7 <= seconds < 15
    assert 58 < chat._seconds(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert chat._seconds(formatdate(time.time() - 60, usegmt=True)) == 0
    replies, server, seconds = ask(body(b"slow down", 429, Retry_After="3600"), count=1)
    assert len(server.requests) == 1 and seconds < 15
    assert replies[0].why == "status 429: 'slow down'; it asks to wait 3600 s"
    for value in ("-5", "soon", "inf", "9" * 400, ""):
        replies, _, seconds = ask(failing(1, body(b"", 429, Retry_After=value), echo), count=1)
        assert replies[0].text and seconds < 15


BAD = {
    "silent": (silent, "no whole reply within 0.3 s"),
    "dripping": (dripping, "no whole reply within 0.3 s"),
    "slow": (after(1.5, echo), "no whole reply within 0.3 s"),
    "hanging up": (hanging_up, "RemoteProtocolError"),
    "endless": (endless, "a body of more than 1000000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_server_that_misbehaves_hangs_nothing(name):
    behave, message = BAD[name]
    replies, server, seconds = ask(behave, timeout=0.3, retries=1)
    assert seconds < 15
    assert all(reply.text is None and message in reply.why for reply in replies)
    assert len(server.requests) == (3 if name == "endless" else 6)


@pytest.mark.parametrize("behave", [silent, dripping, after(30, echo)])
def test_the_deadline_holds_for_all_whatever_else_is_set(behave):
    replies, server, seconds = ask(behave, count=20, timeout=60.0, retries=50, deadline=0.7)
    assert 0.7 <= seconds < 15
    assert len(server.requests) == 8
    assert {reply.why for reply in replies} == {
        "the 0.7 s for all requests were over (0.8 of reward.deadline); before: nothing"
    }


def test_the_deadline_keeps_what_has_come_and_tells_of_the_last_try():
    def half(handler, request, closing):
        even = int(request.text.split()[-1]) % 2 == 0
        (echo if even else failing(1, body(b"warming up", 503), silent))(handler, request, closing)

    replies, _, seconds = ask(half, count=6, timeout=60.0, deadline=1.0)
    assert seconds < 15
    assert [reply.text for reply in replies[::2]] == ["question 0", "question 2", "question 4"]
    assert all(reply.text is None and "before: status 503: 'warming up'" in reply.why for reply in replies[1::2])


def test_no_server_at_all():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    begin = time.monotonic()
    replies = chat.ask(settings_for(url), messages(3))
    assert time.monotonic() - begin < 15
    assert all(reply.why.startswith(f"{url}: ConnectError: ") for reply in replies)


def test_a_name_that_is_never_found_does_not_hold_up(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **names: released.wait(60) and [])
    begin = time.monotonic()
    replies = chat.ask(settings_for("http://vlm.invalid/v1", deadline=0.5, timeout=60.0), messages(3))
    seconds = time.monotonic() - begin
    released.set()
    assert seconds < 15 and all(reply.text is None for reply in replies)


def test_no_questions_need_no_server():
    assert chat.ask(settings_for("http://127.0.0.1:9/v1"), []) == []


# The key


def refuse(handler, request, closing):
    sent = request.headers["Authorization"].removeprefix("Bearer ")
    # Long enough that the key is where the reply is cut
    respond(handler, f"{'x' * 185} {sent} is not a key".encode(), 401)


def test_the_key_is_sent_and_shown_nowhere(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    replies, _, _ = ask(refuse)
    told = [repr(replies), caplog.text, *capfd.readouterr(), repr(settings_for("http://127.0.0.1"))]
    assert "***" in told[0] and not any("sk-" in text for text in told)
    replies, _, _ = ask(well(lambda request: request.headers["Authorization"]))
    assert replies[0].text == "Bearer ***"
    replies, _, _ = ask(body(b"nothing, %s" % KEY.encode()))
    assert replies[0].why == "not JSON: status 200: 'nothing, ***'"


def test_the_key_is_hidden_as_json_and_urls_write_it(monkeypatch):
    monkeypatch.setenv("TEST_VLM_KEY", 'sk-a/b"c+d=secret')
    for form in ('sk-a/b"c+d=secret', r"sk-a/b\"c+d=secret", "sk-a%2Fb%22c%2Bd%3Dsecret"):
        replies, _, _ = ask(body(b"nothing, %s" % form.encode()), count=1)
        assert "***" in replies[0].why and "secret" not in replies[0].why


def test_half_a_character_is_no_failure():
    replies, _, _ = ask(body(rb'{"choices": [{"message": {"content": "\ud800 a fox"}}]}'), count=1)
    assert replies[0].text == "? a fox"


@pytest.mark.parametrize("key", ["", " ", None])
def test_without_a_key_none_is_sent(key, monkeypatch):
    monkeypatch.setenv("TEST_VLM_KEY", key) if key is not None else monkeypatch.delenv("TEST_VLM_KEY")
    replies, server, _ = ask(echo, count=1)
    assert replies[0].text and "Authorization" not in server.requests[0].headers


@pytest.mark.parametrize("key", ["sk-gehëim", "sk-two words", "sk-\x07"])
def test_a_key_that_cannot_be_sent_is_not_shown(key, monkeypatch):
    monkeypatch.setenv("TEST_VLM_KEY", key)
    with pytest.raises(UserError, match="TEST_VLM_KEY: a key has only printable") as raised:
        chat.ask(settings_for("http://127.0.0.1:9/v1"), messages(1))
    assert "sk-" not in str(raised.value) and raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": ""}, "reward.vlm_url='': expected the address .* such as http://localhost:8000/v1"),
        ({"url": "localhost:8000"}, "reward.vlm_url='localhost:8000'"),
        ({"url": "ftp://host/v1"}, "reward.vlm_url='ftp://host/v1'"),
        ({"url": "http:///v1"}, "reward.vlm_url"),
        ({"url": "http://host:70000/v1"}, "reward.vlm_url"),
        ({"url": "http://ho st/v1"}, "reward.vlm_url"),
        ({"url": "http://me:sk-1@host/v1"}, "reward.vlm_url: expected no user"),
        ({"url": "ftp://sk-1@host/v1"}, "reward.vlm_url: expected no user"),
        ({"url": "http://host/v1?key=sk-1"}, "reward.vlm_url: expected no user"),
        ({"model": " "}, "reward.vlm_model=' '"),
        ({"key": "a1b2c3d4e5f6"}, "there is none of the name that is given"),
        ({"key": "sk-1"}, "reward.vlm_key: expected the name of an environment variable"),
        ({"concurrency": 0}, "reward.vlm_concurrency=0: expected 1 or more"),
        ({"retries": -1}, "reward.vlm_retries=-1: expected 0 or more"),
        ({"max_tokens": 0}, "reward.vlm_max_tokens=0: expected 1 or more"),
        ({"timeout": 0.0}, "reward.vlm_timeout=0.0: expected a positive number"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    chat.check(settings_for("https://[::1]:8000/v1/"))
    with pytest.raises(UserError, match=message) as raised:
        chat.check(settings_for("http://localhost:8000/v1")._replace(**changes))
    assert "sk-1" not in str(raised.value)


# Words


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("fox", "Two FOXES."),
        ("foxes", "a fox"),
        ("mouse", "They are mice!"),
        ("mice", "a mouse"),
        ("fish", "fishes"),
        ("wolf", "The wolf's den"),
        ("butterfly", "some butterflies"),
        ("three", "There are 3."),
        ("3", "Three foxes"),
        ("three", "**3**"),
        ("twenty-three", "23 ants"),
        ("23", "twenty three"),
        ("1000", "1,000 bees"),
        ("polar bear", "two polar bears on ice"),
        ("ice-cream", "ice cream"),
        ("élan", "un E\u0301LAN"),
        ("_fox_", "fox"),
    ],
)
def test_a_word_is_found(phrase, text):
    assert words.found_in(phrase, text)


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("ant", "an elephant"),
        ("cat", "cattle"),
        ("three", "thirteen"),
        ("three", "twenty-three"),
        ("3", "3.5 or 13"),
        ("2", "2,000"),
        ("polar bear", "polar white bear"),
        ("polar bear", "polar"),
        ("", "fox"),
        ("fox", ""),
        ("?", "?"),
    ],
)
def test_a_word_is_not_found(phrase, text):
    assert not words.found_in(phrase, text)


def test_every_counting_answer_is_found_in_its_own_prompt():
    found = data.prompt_source("counting")
    for text, metadata in zip(found.texts, found.metadata, strict=True):
        assert all(words.found_in(answer, text) for answer in metadata["answers"])


# What replies are worth


def test_captions_are_scored_and_the_missing_are_missing():
    asked = []

    def fake_ask(messages):
        asked.extend(messages)
        return [Reply("a red fox", ""), Reply(None, "status 500: 'no'"), Reply("an owl", "")]

    def overlap(candidates, references):
        assert references == ["The image contains a fox", "The image contains an {prompt}"]
        return [len(candidate) for candidate in candidates]

    images = make_images(3)
    scores = vlm.captioned(fake_ask, overlap)(images, ("a fox", "a cat", "an {prompt}"))
    np.testing.assert_array_equal(scores.values, [9, np.nan, 6])
    assert scores.why == "status 500: 'no'"
    assert {message.text for message in asked} == {"Answer concisely: what is going on in this image?"}
    for message, picture in zip(asked, images, strict=True):
        file = io.BytesIO()
        Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(file, "JPEG", quality=80)
        assert message.jpeg == file.getvalue()


def test_no_caption_at_all_needs_no_scorer():
    scores = vlm.captioned(lambda messages: [Reply(None, "gone")] * 2, pytest.fail)(make_images(2), ("a", "b"))
    assert np.isnan(scores.values).all() and scores.why == "gone"


def test_captions_come_through_a_host_reward():
    def match(candidates, references):
        return [float(c == r) for c, r in zip(candidates, references, strict=True)]

    with serving(well(lambda request: "A fox")) as server:
        fn, prepare = vlm.make_captioned(settings_for(server.url), lambda: match, reference="A {prompt}")
        reward = rewards.on_host("vlm_clip", fn, prepare=prepare, deadline=10.0, num_workers=1)
        scores = reward.result(reward.submit((), make_images(2), make_prompts(["fox", "cat"])))
    np.testing.assert_array_equal(scores, [[1], [0]])


@pytest.mark.parametrize("name", ["vlm_bertscore", "vlm_clip"])
def test_a_caption_is_compared_by_name(tmp_path, name):
    encoder = str(write_encoder(tmp_path, "bert"))
    said = {"vlm_bertscore": "The image contains a red fox", "vlm_clip": "a red fox"}[name]
    with serving(well(lambda request: said)) as server:
        settings = rewards.Settings(
            *(30.0, 1), clip_model="tiny", bert_model=encoder, bert_layer=2, vlm_url=server.url, vlm_model="seer"
        )
        reward, params = rewards.make(name, settings)
        scores = reward.result(reward.submit(params, make_images(2), make_prompts(["a red fox", "two whales"])))
    whole = {"vlm_bertscore": 1, "vlm_clip": 100}[name]
    assert scores[0] == pytest.approx(whole, rel=1e-5) and scores[1] < 0.999 * whole


COUNTING = {"questions": ("How many mice?", "What animal?"), "answers": ("two", ("mouse", "rat"))}


def answers(texts):
    """An ask whose replies these are, in order; None is missing."""
    return lambda messages: [Reply(text, "" if text else "no reply") for text in texts][: len(messages)]


@pytest.mark.parametrize(
    ("replies", "score"),
    [
        (("There are 2.", "Mice"), 1.0),
        (("Two", "A cat"), 0.5),
        (("three", "rats!"), 0.5),
        (("mouse", "two"), 0.0),
        (("Two", None), np.nan),
    ],
)
def test_the_fraction_of_right_answers(replies, score):
    asked = vlm._asked(make_prompts(["two mice"], [COUNTING]))
    scores = vlm.questioned(answers(replies))(make_images(1), asked)
    np.testing.assert_array_equal(scores.values, [score])
    assert scores.why == ("no reply" if np.isnan(score) else "")


def test_each_picture_is_asked_its_own_questions():
    pixels = {}

    def answer(request):
        picture = Image.open(io.BytesIO(base64.b64decode(request.image.partition(",")[2])))
        pixels[request.text, round(np.asarray(picture).mean())] = True
        return {"How many mice?": "two", "What animal?": "mice", "A fox?": "no"}[request.text]

    images = np.stack([np.full((16, 16, 3), value, np.float32) for value in (0, 1)])
    prompts = make_prompts(["two mice", "a fox"], [COUNTING, {"questions": ["A fox?"], "answers": ["yes"]}])
    with serving(well(answer)) as server:
        fn, prepare = vlm.make_questions(settings_for(server.url))
        np.testing.assert_array_equal(fn(images, prepare(prompts)).values, [1, 0])
    assert pixels.keys() == {("How many mice?", 0), ("What animal?", 0), ("A fox?", 255)}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"questions": ("How many?",)},
        {"questions": (), "answers": ()},
        {"questions": ("How many?",), "answers": ("two", "fox")},
        {"questions": "How many?", "answers": "two"},
        {"questions": ("How many?",), "answers": (2,)},
        {"questions": ("How many?",), "answers": ("?",)},
        {"questions": ("How many?",), "answers": ((),)},
        {"questions": (" ",), "answers": ("two",)},
    ],
)
def test_prompts_without_questions_are_refused_by_name(metadata):
    with pytest.raises(UserError, match=r"the prompt 'two mice' has questions.*prompts\.name=counting, or a \.jsonl"):
        vlm._asked(make_prompts(["two mice"], [metadata]))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("7", 7.0),
        ("It is good.\n\n**7.5**\n\n", 7.5),
        ("Score: 7", 7.0),
        ("**Score:** 7/10", 7.0),
        ("7 / 10.", 7.0),
        ('{"score": 7}', 7.0),
        ("`0`", 0.0),
        ("10", 10.0),
        ("I say 7", None),
        ("7\nbecause it is good", None),
        ("7/100", None),
        ("7 or 8", None),
        ("7-8", None),
        ("11", None),
        ("-1", None),
        ("nan", None),
        ("9" * 500, None),
        ('{"score": NaN}', None),
        ('{"score": 1e999}', None),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"score": ' + "9" * 400 + "}", None),
        ("[" * 100_000, None),
        ("9" * 900_000 + "x", None),
        ("٧", None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_judgement_is_the_number_of_the_last_line(reply, score):
    judge = vlm.judged(answers([reply]), question="{prompt}?", low=0.0, high=10.0)
    begin = time.process_time()
    scores = judge(make_images(1), ("a fox",))
    np.testing.assert_array_equal(scores.values, [np.nan if score is None else score])
    assert time.process_time() - begin < 5
    assert (scores.why == "") == (score is not None) and "\n" not in scores.why and len(scores.why) < 400
    if score is None:
        assert reply.splitlines()[-1][-50:] in scores.why


def test_the_judge_is_told_what_to_judge_and_how_to_end():
    asked = []
    judge = vlm.judged(
        lambda messages: asked.extend(messages) or [Reply("7", "")], question="Is it {prompt}?", low=-1.0, high=7.5
    )
    judge(make_images(1), ("a {prompt} {} fox",))
    assert asked[0].text.startswith("Is it a {prompt} {} fox?\nAnswer with a number from -1 to 7.5.")


@pytest.mark.parametrize(
    ("question", "bounds", "message"),
    [
        (" ", (0.0, 10.0), "reward.vlm_question"),
        ("good?", (10.0, 0.0), r"reward.vlm_lowest=10.0, vlm_highest=0.0: expected two numbers"),
        ("good?", (1.0, 1.0), "reward.vlm_lowest"),
        ("good?", (0.0, float("inf")), "reward.vlm_lowest"),
    ],
)
def test_a_judge_without_a_question_or_a_range_is_refused(question, bounds, message):
    with pytest.raises(UserError, match=message):
        vlm.make_judge(settings_for("http://localhost:8000/v1"), question=question, low=bounds[0], high=bounds[1])


def test_the_client_is_done_before_the_rewards_own_deadline():
    settings = rewards.Settings(
        deadline=1.0, num_workers=1, vlm_model="seer", vlm_question="{prompt}?", vlm_timeout=60.0
    )
    with serving(silent) as server:
        reward, params = rewards.make("vlm_judge", settings._replace(vlm_url=server.url))
        pending = reward.submit(params, make_images(2), make_prompts(["a", "b"]))
        assert np.isnan(reward.result(pending)).all()
        assert "the 0.8 s for all requests were over" in reward.why(pending)


def test_many_pictures_share_a_few_connections():
    with serving(well(lambda request: "7")) as server:
        judge = vlm.judged(
            partial(chat.ask, settings_for(server.url, concurrency=32, timeout=20.0, deadline=20.0)),
            question="{prompt}?",
            low=0.0,
            high=10.0,
        )
        assert (judge(make_images(256), ("a fox",) * 256).values == 7).all()
    assert server.most[0] <= 32
    assert server.connections[0] <= 64  # one that was idle for 5 s is not used again


def test_httpx_is_imported_only_when_it_is_needed():
    code = "import sys, ddpo_jax.rewards; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Prompts with questions


def test_a_json_lines_file_gives_prompts_and_what_is_beside_them(tmp_path):
    path = tmp_path / "prompts.jsonl"
    line = '{"prompt": " two mice ", "questions": ["How many?"], "answers": [["two", "a pair"]], "hard": true}'
    path.write_text(f'\ufeff{line}\n\n{{"prompt": "a fox"}}\r\n{line}\n', encoding="utf-8")
    found = data.prompt_source(str(path))
    assert found.texts == ("two mice", "a fox")
    assert found.metadata == ({"questions": ["How many?"], "answers": [["two", "a pair"]], "hard": True}, {})
    (asked,) = vlm._asked(make_prompts(found.texts[:1], found.metadata[:1]))
    assert asked == (("How many?",), (("two", "a pair"),))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a fox", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["a fox"]', "line 2: expected an object with a prompt"),
        ('{"text": "a fox"}', "line 2: expected an object with a prompt"),
        ('{"prompt": 3}', "line 2: expected an object with a prompt"),
        ('{"prompt": " "}', "line 2: expected an object with a prompt"),
        ('{"prompt": "a", "questions": ["?"]}', "line 2: expected the lists questions and answers"),
        ('{"prompt": "a", "questions": ["?"], "answers": "b"}', "line 2: expected the lists questions and answers"),
        ('{"prompt": "a", "questions": [], "answers": ["b"]}', "line 2: expected the lists questions and answers"),
        ('{"prompt": "an owl", "hard": true}', "line 2: the prompt 'an owl' comes a second time"),
    ],
    ids=lambda value: value[:30],
)
def test_a_json_line_that_cannot_be_used_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "an owl"}\n' + line)
    with pytest.raises(UserError, match=message):
        data.prompt_source(str(path))


def test_a_json_lines_file_without_a_prompt_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n \n")
    with pytest.raises(UserError, match="no prompt in it"):
        data.prompt_source(str(path))


# Whole runs


def run(folder, workdir, url, **changes):
    changes = {
        "num_epochs": 2,
        "eval_every": 0,
        "reward.vlm_url": url,
        "reward.vlm_model": "seer",
        "reward.vlm_key": "TEST_VLM_KEY",
        "reward.vlm_timeout": 5.0,
        "reward.deadline": 10.0,
        **changes,
    }
    return main(flags(folder, workdir, **changes))


def brightness(request):
    picture = Image.open(io.BytesIO(base64.b64decode(request.image.partition(",")[2])))
    return f"It is rather bright.\nScore: {np.asarray(picture).mean() / 25.5:.4f}/10"


def test_a_run_learns_from_a_judge_and_from_counting_and_drops_what_is_missing(small_folder, tmp_path):
    judged = itertools.count(1)

    def now_and_then(handler, request, closing):
        if request.text.startswith(("How many", "What animal")):
            return respond(handler, say("two foxes"))
        unwilling = next(judged) % 8 == 7  # one of each chunk, of which the first comes after two grey pictures
        respond(handler, say("I would rather not" if unwilling else brightness(request)))

    changes = {
        "reward.name": "vlm_judge,vlm_questions",
        "reward.vlm_highest": 10.0,
        "reward.max_missing": 0.5,
        "prompts.name": "counting",
    }
    with serving(now_and_then) as server:
        assert run(small_folder, tmp_path / "run", server.url, **changes) == 0
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["reward/missing"] for row in rows] == [1, 1]
    assert all(0 < row["reward/vlm_judge"] < 10 and row["skipped_steps"] == 0 for row in rows)
    assert all(0 <= row["reward/vlm_questions"] <= 1 for row in rows)
    # Three about each picture: two of the probe, those of an evaluation before and one after, and the rounds' own
    assert len(server.requests) == 3 * (2 + 4 * SMALL["sample.num_prompts"])
    assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in server.requests)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(KEY.encode() in path.read_bytes() for path in written)


STOPPED = {
    "garbage": (body(b"I am no chat server"), "not JSON: status 200: 'I am no chat server'"),
    "no number": (well(lambda request: "a fine picture"), "of the reply 'a fine picture'"),
    "refused": (refuse, "status 401: "),
    "silent": (silent, "no whole reply within 0.5 s"),
    "broken": (body(b"CUDA out of memory", 500), "status 500: 'CUDA out of memory'"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_over_a_server_that_is_no_use_stops_at_once_and_shows_the_reply(name, small_folder, tmp_path, capsys):
    behave, message = STOPPED[name]
    with serving(behave) as server:
        begin = time.monotonic()
        changes = {"reward.name": "vlm_judge", "reward.vlm_retries": 1, "reward.vlm_timeout": 0.5}
        code = run(small_folder, tmp_path / "run", server.url, **changes)
        assert time.monotonic() - begin < 60
    errors = capsys.readouterr().err
    assert code == 3 and errors.count("\n") == 1 and "sk-" not in errors
    assert "the reward gave no score for two grey pictures" in errors and message in errors
    assert not (tmp_path / "run").exists()


def test_a_server_that_fails_later_stops_the_run_with_its_last_reply(small_folder, tmp_path, capsys):
    counted = []

    def dying(handler, request, closing):
        counted.append(request)
        well(brightness)(handler, request, closing) if len(counted) <= 6 else respond(handler, b"bad gateway", 404)

    with serving(dying) as server:
        assert run(small_folder, tmp_path / "run", server.url, **{"reward.name": "vlm_judge"}) == 3
    errors = capsys.readouterr().err
    assert "8 of 8 rewards are missing" in errors and "The last: vlm_judge: status 404: 'bad gateway'" in errors


def test_one_address_is_asked_for_before_anything_is_made(small_folder, tmp_path, capsys):
    assert run(small_folder, tmp_path / "run", "", **{"reward.name": "vlm_judge"}) == 2
    assert "such as http://localhost:8000/v1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"reward\.vlm_model"):
        rewards.make("vlm_questions", rewards.Settings(deadline=1.0, num_workers=1, vlm_url="http://localhost:8000"))
