"""Answers that have to match something, through the engine and beside it."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import read_artifact
from infopt.core.errors import EngineError, UsageError
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.grammar import Constraint, Grammar, GrammarCompiler, tokenizer_source
from infopt.core.runtime.llm import LLM
from infopt.core.runtime.request import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(default_artifact: Any) -> Any:
    return default_artifact.tokenizer()


@pytest.fixture(scope="module")
def compiler(default_artifact: Any, tokenizer: Any) -> GrammarCompiler:
    source = tokenizer_source(default_artifact)
    return GrammarCompiler(source, 49152 + 64, [tokenizer.eos_token_id])


def follow(constraint: Constraint, tokens: list[int]) -> None:
    for token in tokens:
        assert constraint.allowed()[token], token
        assert constraint.accept(token)


def test_only_what_can_go_on_is_allowed(compiler: GrammarCompiler, tokenizer: Any) -> None:
    constraint = compiler.compile(Grammar("regex", "ab+"))
    allowed = constraint.allowed()
    assert allowed.shape == (49152 + 64,) and allowed.dtype == torch.bool
    texts = {tokenizer.decode([token]) for token in allowed.nonzero().flatten().tolist()}
    assert texts and all(re.fullmatch("ab*", text) for text in texts)
    follow(constraint, tokenizer.encode("ab"))
    assert constraint.allowed()[tokenizer.eos_token_id] and not constraint.is_over


def test_a_copy_goes_its_own_way(compiler: GrammarCompiler, tokenizer: Any) -> None:
    one = compiler.compile(Grammar.choice(["yes", "no"]))
    two = one.copy()
    follow(one, tokenizer.encode("yes"))
    follow(two, tokenizer.encode("no"))
    assert one.is_over and two.is_over
    assert not one.accept(tokenizer.encode("x")[0]), "nothing follows"


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("json_object"), '{"a": [1, {"b": null}], "c": "é"}'),
        (Grammar.json_schema({"type": "array", "items": {"type": "integer"}}), "[1, 22, -3]"),
        (Grammar("lark", 'start: "x"~3'), "xxx"),
        (Grammar.choice(['"quoted"', "line\nbreak", "日本"]), "日本"),
        (Grammar.choice(["a\x7fb", "\u2028"]), "a\x7fb"),
    ],
    ids=str,
)
def test_what_matches_is_taken(
    compiler: GrammarCompiler, tokenizer: Any, grammar: Grammar, text: str
) -> None:
    constraint = compiler.compile(grammar)
    follow(constraint, tokenizer.encode(text))
    assert constraint.is_over or constraint.allowed()[tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("regex", "(a"),
        Grammar("lark", "start: nothing"),
        Grammar("choice", "[]"),
        Grammar("choice", '["a", ""]'),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(UsageError, match=r"is refused|choice needs"):
        compiler.compile(grammar)


@pytest.mark.parametrize(("kind", "text"), [("json_object", "x"), ("regex", ""), ("html", "a")])
def test_what_says_nothing_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(UsageError):
        Grammar(kind, text)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    settings = EngineSettings(kv_blocks=30, block_size=4, dtype="float32", max_model_len=120)
    return LLM(read_artifact(tiny_model), settings)


def test_answers_match_though_they_are_preempted_and_forked(tiny_model: Path) -> None:
    settings = EngineSettings(kv_blocks=16, block_size=4, dtype="float32", max_model_len=64)
    llm = LLM(read_artifact(tiny_model), settings)
    pattern = r"[a-z]{3,40}( [a-z]{2,5}){5}\."
    params = SamplingParams(
        50, temperature=1.3, seed=1, n=3, grammar=Grammar("regex", pattern), cache_salt="x"
    )
    prompts = ["Say something", *(f"And more, {n}" for n in range(5))]
    made = llm.generate(prompts, params)
    assert len(made) == 18 and len({each.text for each in made}) == 18
    for each in made:
        assert each.finish_reason == "stop" and re.fullmatch(pattern, each.text), each.text
    assert llm.engine.stats().preemptions > 0
    alone = llm.generate("Say something", params)
    assert [each.text for each in alone] == [each.text for each in made[:3]]


def test_an_unfinished_answer_is_the_beginning_of_one(llm: LLM) -> None:
    (made,) = llm.generate(
        "Numbers:", SamplingParams(4, temperature=0, grammar=Grammar("regex", "([0-9]{9} ){9}"))
    )
    assert made.finish_reason == "length" and re.fullmatch("[0-9 ]+", made.text)


def test_one_request_with_a_schema_leaves_the_others_alone(llm: LLM) -> None:
    plain = SamplingParams(10, temperature=0, ignore_eos=True)
    (alone,) = llm.generate("Hello", plain)
    schema = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "boolean"}},
                                  "required": ["a"], "additionalProperties": False})  # fmt: skip
    llm.engine.add("g", [5, 6, 7], SamplingParams(40, temperature=0, grammar=schema))
    (beside,) = llm.generate("Hello", plain)
    assert beside.token_ids == alone.token_ids


def test_a_json_answer_is_json(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    found = llm.generate(
        "Hi", SamplingParams(110, seed=0, n=4, grammar=Grammar.json_schema(schema))
    )
    assert all(each.finish_reason == "stop" for each in found), "white space has an end"
    assert all(json.loads(each.text)["a"] in (1, 2) for each in found)


def test_a_grammar_that_gives_up_is_an_error_and_no_match(llm: LLM) -> None:
    """This one grows beyond llguidance's own limits after some thirty tokens."""
    grammar = Grammar("regex", "((a{1,100}){1,100}){1,100}")
    params = SamplingParams(100, temperature=0, grammar=grammar)
    with pytest.raises(EngineError, match="gave up"):
        llm.generate("a", params)
    assert llm.engine.stats().blocks_used == 0
    assert llm.generate("a", SamplingParams(2, temperature=0, ignore_eos=True))


def test_a_grammar_too_long_or_too_deep() -> None:
    with pytest.raises(UsageError, match="longer than 65,536"):
        Grammar("regex", "a" * 70_000)
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"not": deep}
    with pytest.raises(UsageError, match="too deeply"):
        Grammar.json_schema(deep)


@pytest.mark.parametrize("values", [{"ignore_eos": True}, {"min_tokens": 2}], ids=str)
def test_what_contradicts_a_grammar(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="contradicts a grammar"):
        SamplingParams(grammar=Grammar("regex", "a"), **values)


@pytest.mark.parametrize(
    ("told", "fine"),
    [
        ([5, 0.01, 100_000, 2.5], True),
        ([9973], True),
        ([999_983], False),
        ([9973, 9967], False),
        ([99_991.5], False),
        ([10**400 - 1], False),
        ([5, True, "999983", None], False),
    ],
    ids=str,
)
def test_multiples_that_would_take_long(
    compiler: GrammarCompiler, told: list[Any], fine: bool
) -> None:
    """Ten seconds for the largest, in which the engine does nothing else."""
    parts = [{"type": "number", "multipleOf": value} for value in told]
    schema = {"type": "object", "properties": {str(n): part for n, part in enumerate(parts)}}
    text = json.dumps(schema).replace("multipleOf", r"multiple\u004ff", 1)
    began = time.perf_counter()
    for grammar in (
        Grammar.json_schema(schema),
        Grammar("json_schema", f" {text}"),
        Grammar("lark", f'start: "a" /b/ | c\nc: %json\n {text}'),
        Grammar("lark", "start: " + " | ".join(f"%json {json.dumps(part)}" for part in parts)),
    ):
        if fine:
            compiler.compile(grammar)
        else:
            with pytest.raises(UsageError, match="is refused"):
                compiler.compile(grammar)
    assert time.perf_counter() - began < 5


def test_a_number_too_long_for_python_hides_nothing(compiler: GrammarCompiler) -> None:
    schema = '{"default": ' + "9" * 5000 + ', "type": "integer", "multipleOf": 999983}'
    with pytest.raises(UsageError, match="is refused"):
        compiler.compile(Grammar("json_schema", schema))
