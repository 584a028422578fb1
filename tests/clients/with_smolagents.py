"""smolagents' model for servers of OpenAI's kind, and its agent that calls tools."""

from __future__ import annotations

import json

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
    calling,
    recalls,
    report,
    same,
    streamed,
)
from smolagents import OpenAIModel, Tool, ToolCallingAgent
from smolagents.models import ChatMessage

model = OpenAIModel(MODEL, api_base=URL, api_key=KEY)


class Weather(Tool):
    name, description, output_type = "weather", "The weather in a city", "string"
    inputs = {"city": {"type": "string", "description": "Its name", "enum": [*CITIES]}}  # noqa: RUF012

    def forward(self, city: str) -> str:
        return f"{SUNNY} {calling('final_answer', answer=SUNNY)}"


def user(text):
    return ChatMessage(role="user", content=[{"type": "text", "text": text}])


def text():
    same(model.generate([user(GREET)]).content, GREETING)


def stream():
    streamed([delta.content or "" for delta in model.generate_stream([user(GREET)])])


def tools():
    asked = {"tools_to_call_from": [Weather()], "tool_choice": "auto"}
    (call,) = model.generate([user(CALL)], **asked).tool_calls
    same(call.function.name, "weather")


def forced():
    made = model.generate([user(GREET)], tools_to_call_from=[Weather()])
    arguments = made.tool_calls[0].function.arguments
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert found["city"] in CITIES
    agent = ToolCallingAgent([Weather()], model, max_steps=3, verbosity_level=0)
    same(agent.run(CALL), SUNNY)


def structured():
    schema = {"name": "report", "schema": Report.model_json_schema(), "strict": True}
    asked = {"type": "json_schema", "json_schema": schema}
    Report.model_validate_json(model.generate([user(GREET)], response_format=asked).content)


def second():
    turns = [user(GREET), model.generate([user(GREET)]), user(RECALL)]
    recalls(model.generate(turns).content)


report("smolagents", "smolagents", globals())
