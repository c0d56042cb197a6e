"""The official OpenAI client against a running gateway that serves minnow: python openai_chat.py HOST:PORT"""

import sys

import openai

QUESTION = [{"role": "user", "content": "What is 348 + 277?"}]
ANSWER = "625"


def raised(kind, call):
    """The error of `kind` that `call` must raise."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def models(client):
    listed = [model.id for model in client.models.list()]
    assert len(listed) == 1, listed
    assert client.models.retrieve(listed[0]).id == listed[0]
    return listed[0]


def plain(client, model):
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    message = answer.choices[0].message
    assert ANSWER in message.content, answer
    assert message.reasoning_content, answer
    assert answer.choices[0].finish_reason == "stop", answer
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens, usage
    return answer


def streamed(client, model, wanted):
    chunks = list(
        client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    *parts, last = chunks
    assert last.choices == [] and last.usage == wanted.usage, last
    deltas = [part.choices[0].delta for part in parts]
    content = "".join(delta.content or "" for delta in deltas)
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    message = wanted.choices[0].message
    assert (content, reasoning) == (message.content, message.reasoning_content), (content, reasoning)
    assert deltas[0].role == "assistant", parts[0]
    assert sum(bool(delta.content or getattr(delta, "reasoning_content", None)) for delta in deltas) > 3, "no stream"
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def options(client, model, wanted):
    def create(**fields):
        return client.chat.completions.create(model=model, messages=QUESTION, temperature=0, **fields)

    text = wanted.choices[0].message.content
    stopped = create(stop=[ANSWER]).choices[0]
    assert stopped.message.content == text.split(ANSWER)[0] and stopped.finish_reason == "stop", stopped
    several = create(n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2], several
    assert all(choice.message.content == text for choice in several.choices), several
    assert several.usage.completion_tokens == 3 * wanted.usage.completion_tokens, several.usage
    short = create(max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2, short
    logprobs = create(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(logprobs) > 3, logprobs
    for token in logprobs:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0, token
        assert token.token == token.top_logprobs[0].token, "greedy takes the most likely"
    seeded = [create(seed=7, top_p=0.9, extra_body={"temperature": 1.5}).choices[0].message for _ in range(2)]
    assert seeded[0] == seeded[1], seeded


def completions(client, model):
    answer = client.completions.create(model=model, prompt="One and one is", max_tokens=5, temperature=0)
    chunks = client.completions.create(model=model, prompt="One and one is", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert answer.usage.completion_tokens <= 5, answer


def errors(client, model):
    create = client.chat.completions.create
    error = raised(openai.NotFoundError, lambda: create(model="no-such-model", messages=QUESTION))
    assert error.param == "model" and "no-such-model" in error.message, error.body
    error = raised(openai.BadRequestError, lambda: create(model=model, messages=[]))
    assert error.param == "messages", error.body
    error = raised(openai.BadRequestError, lambda: create(model=model, messages=QUESTION, temperature=-1))
    assert error.param == "temperature", error.body
    long = [{"role": "user", "content": "1" * 5000}]
    error = raised(openai.BadRequestError, lambda: create(model=model, messages=long))
    assert error.code == "context_length_exceeded", error.body
    raised(openai.BadRequestError, lambda: create(model=model, messages=QUESTION, max_tokens=0))
    raised(openai.BadRequestError, lambda: list(create(model=model, messages=[], stream=True)))


def main():
    client = openai.OpenAI(base_url=f"http://{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=60)
    model = models(client)
    wanted = plain(client, model)
    streamed(client, model, wanted)
    options(client, model, wanted)
    completions(client, model)
    errors(client, model)
    print(f"openai {openai.__version__}: all as it should be")


main()
