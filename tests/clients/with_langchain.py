"""LangChain's ChatOpenAI, over chats and over responses."""

from __future__ import annotations

from typing import Literal

from client_checks import (
    CALL,
    CITIES,
    GREET,
    GREETING,
    KEY,
    MODEL,
    RECALL,
    SUNNY,
    URL,
    Report,
    recalls,
    report,
    same,
    streamed,
)
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: Literal["Oslo", "Lima"]) -> str:
    """The weather in a city."""
    return SUNNY


def check(client: str, model: ChatOpenAI) -> None:
    def text():
        same(model.invoke(GREET).text, GREETING)

    def stream():
        streamed([chunk.text for chunk in model.stream(GREET)])
        whole = sum_of(model.bind_tools([weather]).stream(CALL))
        same(whole.tool_calls[0]["args"], {"city": "Oslo"})

    def tools():
        (call,) = model.bind_tools([weather]).invoke(CALL).tool_calls
        same((call["name"], call["args"]), ("weather", {"city": "Oslo"}))

    def forced():
        for choice in ("any", "weather"):
            made = model.bind_tools([weather], tool_choice=choice).invoke(GREET)
            assert made.tool_calls[0]["args"]["city"] in CITIES
        by_call = model.with_structured_output(Report, method="function_calling")
        assert isinstance(by_call.invoke(GREET), Report)

    def structured():
        assert isinstance(model.with_structured_output(Report).invoke(GREET), Report)

    def second():
        turns = [HumanMessage(GREET), model.invoke(GREET), HumanMessage(RECALL)]
        recalls(model.invoke(turns).text)
        bound = model.bind_tools([weather])
        called = bound.invoke(CALL)
        result = weather.invoke(called.tool_calls[0])
        same(bound.invoke([HumanMessage(CALL), called, result]).text, f"It says: {SUNNY}")

    report(client, "langchain-openai", locals())


def sum_of(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


common = {"model": MODEL, "base_url": URL, "api_key": KEY}
check("langchain-openai, chat", ChatOpenAI(**common))
check("langchain-openai, responses", ChatOpenAI(**common, use_responses_api=True))
