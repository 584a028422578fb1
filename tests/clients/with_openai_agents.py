"""OpenAI's agents, over chats and over responses."""

from __future__ import annotations

from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
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
from openai import AsyncOpenAI

set_tracing_disabled(True)
cities = []


@function_tool
def weather(city: Literal["Oslo", "Lima"]) -> str:
    """The weather in a city."""
    cities.append(city)
    return SUNNY


def check(client: str, kind) -> None:
    def agent(**settings):
        model = kind(MODEL, AsyncOpenAI(base_url=URL, api_key=KEY))
        return Agent("assistant", model=model, **settings)

    async def text():
        same((await Runner.run(agent(), GREET)).final_output, GREETING)

    async def stream():
        events = Runner.run_streamed(agent(), GREET).stream_events()
        data = [event.data async for event in events if event.type == "raw_response_event"]
        streamed([e.delta for e in data if e.type == "response.output_text.delta"])
        result = Runner.run_streamed(agent(tools=[weather]), CALL)
        async for _ in result.stream_events():
            pass
        same(result.final_output, f"It says: {SUNNY}")

    async def tools():
        cities.clear()
        made = await Runner.run(agent(tools=[weather]), CALL)
        same((made.final_output, cities), (f"It says: {SUNNY}", ["Oslo"]))

    async def forced():
        for choice in ("required", "weather"):
            cities.clear()
            settings = ModelSettings(tool_choice=choice)
            made = await Runner.run(agent(tools=[weather], model_settings=settings), GREET)
            same(made.final_output, f"It says: {SUNNY}")
            assert cities

    async def structured():
        made = await Runner.run(agent(output_type=Report), GREET)
        assert isinstance(made.final_output, Report)

    async def second():
        first = await Runner.run(agent(tools=[weather]), GREET)
        turns = [*first.to_input_list(), {"role": "user", "content": RECALL}]
        again = await Runner.run(agent(tools=[weather]), turns)
        recalls(again.final_output)
        turns = [*again.to_input_list(), {"role": "user", "content": CALL}]
        called = await Runner.run(agent(tools=[weather]), turns)
        same(called.final_output, f"It says: {SUNNY}")

    report(client, "openai-agents", locals())


check("openai-agents, chat", OpenAIChatCompletionsModel)
check("openai-agents, responses", OpenAIResponsesModel)
