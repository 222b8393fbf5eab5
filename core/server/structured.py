"""What clients say that an answer has to match, in OpenAI's words and in vLLM's."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from infopt.core.runtime.grammar import Grammar

Schema = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]


def refused(key: str, why: str) -> PydanticCustomError:
    """What a validator raises for a field that does not work as it is given."""
    return PydanticCustomError("unsupported_value", "{key} {why}", {"key": key, "why": why})


class JsonSchema(BaseModel):
    """OpenAI's schema with its labels; it is always kept to, `strict` or not."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        told = self.json_schema
        if self.type == "json_schema":
            told_right = told is not None and told.schema_ is not None
        else:
            told_right = told is None
        if not told_right:
            raise refused(
                "response_format", "goes with json_schema.schema, and json_schema with it alone"
            )
        return self

    def grammar(self) -> Grammar | None:
        match self.type:
            case "text":
                return None
            case "json_object":
                return Grammar("json_object")
            case "json_schema":
                assert self.json_schema is not None and self.json_schema.schema_ is not None
                return Grammar.json_schema(self.json_schema.schema_)


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: one of these."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar_: Annotated[Text | None, Field(alias="grammar")] = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if sum(value is not None for value in self.__dict__.values()) != 1 or (
            self.json_object is False
        ):
            raise refused(
                "structured_outputs", "needs one of json, json_object, regex, choice and grammar"
            )
        return self

    def grammar(self) -> Grammar:
        if isinstance(self.json_, str):
            return Grammar("json_schema", self.json_)
        if self.json_ is not None:
            return Grammar.json_schema(self.json_)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        if self.grammar_ is not None:
            return Grammar("lark", self.grammar_)
        return Grammar("json_object")
