"""Completions: whole and streamed, several at once, with everything that a body may say."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from ..conftest import prompt
from .served import Served, any_step, events_of, greedy, new_id, text_of

PATH = "/v1/completions"
TEXT = "Once upon a time there was a"


def test_a_completion_has_openais_shape(served: Served) -> None:
    answer = served.post(PATH, greedy(TEXT, 8, model="whatever"))
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["model"] == served.service.model_name != "whatever"
    assert body["id"].startswith("cmpl-")
    choice = body["choices"][0]
    assert choice["index"] == 0
    assert choice["text"]
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(served.engine.model.tokenize(TEXT))
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_a_stream_brings_the_same_text_in_pieces(served: Served) -> None:
    whole = served.post(PATH, greedy(TEXT)).json()
    streamed = served.post(PATH, greedy(TEXT, stream=True))
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert len(events) > 5
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert len({(event["id"], event["model"], event["created"]) for event in events}) == 1
    assert not any("usage" in event for event in events)


def test_a_stream_tells_its_usage_if_it_is_asked_to(llama: Served) -> None:
    events = events_of(llama.post(PATH, greedy(TEXT, 5, stream=True, stream_options={"include_usage": True})).text)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)


def test_a_prompt_is_text_texts_tokens_or_lists_of_tokens(served: Served) -> None:
    tokens = served.engine.model.tokenize(TEXT).tolist()
    other = served.engine.model.tokenize("Another one").tolist()
    first = text_of(served.post(PATH, greedy(TEXT)))
    second = text_of(served.post(PATH, greedy("Another one")))
    assert first != second
    assert text_of(served.post(PATH, greedy(tokens))) == first
    for several in ([TEXT, "Another one"], [tokens, other]):
        body = served.post(PATH, greedy(several)).json()
        assert [choice["text"] for choice in body["choices"]] == [first, second]
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert body["usage"]["prompt_tokens"] == len(tokens) + len(other)


def test_a_seed_gives_the_same_answer_again(llama: Served) -> None:
    body = {"prompt": TEXT, "max_tokens": 12, "temperature": 1.5, "seed": 7}
    text = text_of(llama.post(PATH, body))
    assert text_of(llama.post(PATH, body)) == text
    assert text_of(llama.post(PATH, {**body, "seed": 8})) != text


def test_several_answers_have_seeds_of_their_own(llama: Served) -> None:
    body = llama.post(PATH, {"prompt": TEXT, "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 3}).json()
    assert len({choice["text"] for choice in body["choices"]}) == 3
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 36
    assert body["usage"]["prompt_tokens"] == len(llama.engine.model.tokenize(TEXT))


def test_several_streams_are_told_apart_by_their_index(served: Served) -> None:
    body = greedy([TEXT, "Another"], 6, n=2)
    whole = [choice["text"] for choice in served.post(PATH, body).json()["choices"]]
    texts, ends = [""] * 4, [""] * 4
    for event in events_of(served.post(PATH, {**body, "stream": True}).text):
        choice = event["choices"][0]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == whole
    assert whole[0] == whole[1] != whole[2] == whole[3]
    assert ends == ["length"] * 4


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_echo_puts_each_prompt_before_its_answers(llama: Served, stream: bool) -> None:
    model = llama.engine.model
    given = [TEXT, "Wörter, 词"]
    body = greedy([model.tokenize(text, add_special=False).tolist() for text in given], 6, n=2)
    for prompts, prefixes in ((given, given), (body["prompt"], [model.detokenize(each) for each in body["prompt"]])):
        body["prompt"] = prompts
        plain = [choice["text"] for choice in llama.post(PATH, body).json()["choices"]]
        answer = llama.post(PATH, {**body, "echo": True, "stream": stream})
        texts = [""] * 4
        for each in events_of(answer.text) if stream else [answer.json()]:
            for choice in each["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == [prefixes[index // 2] + text for index, text in enumerate(plain)]


def test_an_echo_of_tokens_names_the_special_ones(llama: Served) -> None:
    model = llama.engine.model
    text = text_of(llama.post(PATH, greedy([model.eos, 300], 1, echo=True)))
    assert text.startswith(model.token_to_piece(model.eos).decode())


def test_an_echo_comes_even_if_there_is_no_answer(llama: Served) -> None:
    name = new_id("late")
    with llama.held(any_step) as hold:
        answers: list[Any] = []
        body = greedy(TEXT, 3, echo=True, stream=True)
        asking = threading.Thread(
            target=lambda: answers.append(llama.post(PATH, body, headers={"X-Request-Id": name})), daemon=True
        )
        asking.start()
        llama.wait_known(name)
        llama.engine.cancel(name)
        hold.release()
    asking.join(60)
    choices = [event["choices"][0] for event in events_of(answers[0].text)]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [(TEXT, "cancelled")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"prompt": "x", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
def test_a_priority_goes_first(llama: Served, path: str, body: dict[str, Any]) -> None:
    names = [new_id("priority") for _ in range(4)]
    priorities = [None, -3.0, 100, 7]
    with llama.held(any_step) as hold:
        busy = [llama.engine.submit("Something else", max_tokens=4) for _ in range(llama.engine.slots)]
        hold.wait()
        askings = []
        for name, priority in zip(names, priorities, strict=True):
            headers = {"X-Request-Id": name}
            given = {**body, "priority": priority}
            askings.append(threading.Thread(target=llama.post, args=(path, given), kwargs={"headers": headers}))
            askings[-1].start()
            llama.wait_known(name)
        line = [(view.id, view.priority) for view in llama.engine.snapshot().queue if view.id in names]
        assert line == [(names[2], 100), (names[3], 7), (names[0], 0), (names[1], -3)]
        hold.release()
    for asking in askings:
        asking.join(60)
    for generation in busy:
        generation.result(60)


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(served: Served) -> None:
    whole = text_of(served.post(PATH, greedy(TEXT, 32)))
    stop = whole[len(whole) // 2 :][:4]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never in there \x00", stop]):
        choice = served.post(PATH, greedy(TEXT, 32, stop=given)).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    events = events_of(served.post(PATH, greedy(TEXT, 32, stop=stop, stream=True)).text)
    assert "".join(event["choices"][0]["text"] for event in events) == expected


def test_a_bias_can_force_and_forbid_a_token(llama: Served) -> None:
    model = llama.engine.model
    forced = int(model.tokenize("hello", add_special=False)[0])
    text = text_of(llama.post(PATH, greedy(TEXT, 3, logit_bias={str(forced): 100})))
    assert text == (model.token_to_piece(forced) * 3).decode()
    body = llama.post(PATH, greedy(TEXT, 4, logprobs=1)).json()
    likeliest = body["choices"][0]["logprobs"]["tokens"][0]
    ids = [token for token in range(model.n_vocab) if model.token_to_piece(token) == likeliest.encode()]
    other = llama.post(PATH, greedy(TEXT, 4, logprobs=1, logit_bias={str(token): -100 for token in ids})).json()
    assert other["choices"][0]["logprobs"]["tokens"][0] != likeliest


def test_a_grammar_binds_the_answer(served: Served) -> None:
    body = {"prompt": TEXT, "max_tokens": 20, "seed": 1, "grammar": 'root ::= ("yes" | "no") "!"'}
    choice = served.post(PATH, body).json()["choices"][0]
    assert choice["text"] in ("yes!", "no!")
    assert choice["finish_reason"] == "stop"


def test_penalties_change_what_is_chosen(llama: Served) -> None:
    plain = text_of(llama.post(PATH, greedy("a a a a a a a a a a", 24)))
    for field in ({"repeat_penalty": 5.0}, {"frequency_penalty": 2.0, "presence_penalty": 2.0}):
        assert text_of(llama.post(PATH, greedy("a a a a a a a a a a", 24, **field))) != plain


@pytest.mark.parametrize("field", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}], ids=["top_k", "top_p", "min_p"])
def test_truncations_leave_the_likeliest(llama: Served, field: dict[str, float]) -> None:
    likeliest = text_of(llama.post(PATH, greedy(TEXT, 8)))
    assert (
        text_of(llama.post(PATH, {"prompt": TEXT, "max_tokens": 8, "temperature": 1.0, "seed": 5, **field}))
        == likeliest
    )


SAMPLED = {"prompt": TEXT, "max_tokens": 8, "temperature": 1.0, "seed": 5}


@pytest.mark.parametrize(
    ("sent", "meant"),
    [({"top_k": -1}, {"top_k": 0}), ({"stop": ""}, {}), ({"stop": ["", "\x00"]}, {"stop": ["\x00"]})],
    ids=["top_k", "stop", "stops"],
)
def test_what_other_servers_clients_send_means_the_same_here(llama: Served, sent: Any, meant: Any) -> None:
    assert text_of(llama.post(PATH, SAMPLED | sent)) == text_of(llama.post(PATH, SAMPLED | meant))


def test_a_temperature_above_two_is_taken(llama: Served) -> None:
    assert text_of(llama.post(PATH, SAMPLED | {"temperature": 5.0}))


def test_minus_one_for_max_tokens_is_as_many_as_fit_and_zero_is_refused_with_words(llama: Served) -> None:
    room = 3
    given = [300] * (llama.engine.n_ctx - room)
    usage = llama.post(PATH, greedy(given, -1, logit_bias={str(llama.engine.model.eos): -100})).json()["usage"]
    assert usage["completion_tokens"] >= room
    refused = llama.post(PATH, greedy(TEXT, 0))
    assert refused.status_code == 400
    assert "-1 stands for as many as fit" in refused.json()["error"]["message"]


def test_logprobs_come_in_the_form_of_completions(served: Served) -> None:
    choice = served.post(PATH, greedy(TEXT, 6, logprobs=3)).json()["choices"][0]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 6
    assert told["text_offset"][0] == 0
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert logprob <= 0
        assert 1 <= len(top) <= 3
        assert math.isclose(max(top.values()), logprob)  # greedy: the chosen one is the likeliest
        assert token in top
    events = events_of(served.post(PATH, greedy(TEXT, 6, logprobs=3, stream=True)).text)
    parts = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[name]] == told[name]
    streamed = [value for part in parts for value in part["token_logprobs"]]
    assert streamed == pytest.approx(told["token_logprobs"], abs=1e-3)


def test_logprobs_without_alternatives_are_only_the_tokens(llama: Served) -> None:
    told = llama.post(PATH, greedy(TEXT, 3, logprobs=0)).json()["choices"][0]["logprobs"]
    assert told["top_logprobs"] == [{}, {}, {}]
    assert all(value <= 0 for value in told["token_logprobs"])


def test_without_max_tokens_a_completion_has_openais_sixteen(llama: Served) -> None:
    assert llama.post(PATH, {"prompt": TEXT, "temperature": 0}).json()["usage"]["completion_tokens"] == 16


def test_a_prompt_that_was_there_before_is_not_read_again(served: Served) -> None:
    tokens = prompt(served.engine.model, 200, seed=77).tolist()
    first = served.post(PATH, greedy(tokens, 4)).json()
    again = served.post(PATH, greedy(tokens, 4)).json()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 200
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_an_answer_may_fill_the_context_and_no_more(llama: Served) -> None:
    n_ctx = llama.engine.n_ctx
    tokens = prompt(llama.engine.model, n_ctx - 4, seed=5).tolist()
    body = llama.post(PATH, greedy(tokens, 100)).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert 1 <= body["usage"]["completion_tokens"] <= 5
    refused = llama.post(PATH, greedy(prompt(llama.engine.model, n_ctx, seed=5).tolist(), 1))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_fields_are_ignored(llama: Served) -> None:
    assert llama.post(PATH, greedy(TEXT, 2, no_such_field={"a": 1}, user="somebody")).status_code == 200
