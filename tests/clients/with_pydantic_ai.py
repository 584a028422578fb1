"""pydantic-ai, over chats and over responses."""

from __future__ import annotations

from typing import Literal

from client_checks import (
    CALL,
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
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


def weather(city: Literal["Oslo", "Lima"]) -> str:
    """The weather in a city."""
    cities.append(city)
    return SUNNY


cities = []


def check(client: str, model) -> None:
    def text():
        same(Agent(model).run_sync(GREET).output, GREETING)

    async def stream():
        async with Agent(model).run_stream(GREET) as result:
            streamed([piece async for piece in result.stream_text(delta=True, debounce_by=None)])

    def tools():
        cities.clear()
        same(Agent(model, tools=[weather]).run_sync(CALL).output, f"It says: {SUNNY}")
        same(cities, ["Oslo"])

    def forced():
        made = Agent(model, output_type=ToolOutput(Report)).run_sync(GREET)
        assert isinstance(made.output, Report)
        made = Agent(model, output_type=Report, tools=[weather]).run_sync(GREET)
        assert isinstance(made.output, Report)

    def structured():
        made = Agent(model, output_type=NativeOutput(Report)).run_sync(GREET)
        assert isinstance(made.output, Report)

    def second():
        agent = Agent(model, tools=[weather])
        first = agent.run_sync(GREET)
        again = agent.run_sync(RECALL, message_history=first.all_messages())
        recalls(again.output)
        called = agent.run_sync(CALL, message_history=again.all_messages())
        same(called.output, f"It says: {SUNNY}")

    report(client, "pydantic-ai-slim", locals())


provider = OpenAIProvider(base_url=URL, api_key=KEY)
check("pydantic-ai, chat", OpenAIChatModel(MODEL, provider=provider))
check("pydantic-ai, responses", OpenAIResponsesModel(MODEL, provider=provider))
