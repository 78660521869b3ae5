"""Chat templates rendered within limits.

A template is a program of somebody else's. Jinja's sandbox keeps it from this machine's files; here its loops, its
operations and its output are bounded too, and nothing is computed while it is compiled. What none of this sees, only
the operating system can bound: `tried` renders short conversations with a new template in a process of its own, which
runs this file and therefore imports nothing of the package.
"""

import functools
import json
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import compiler, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

MAX_STEPS = 2_000_000  # turns of loops and calls of macros, in one conversation
MAX_CHARACTERS = 1 << 28  # of one conversation, and of one text in it
MAX_NUMBER = 1 << 28  # as good as any for a length
MAX_SECONDS, MAX_BYTES, MAX_SHORT_STEPS = 3, 1 << 30, 100_000  # for a few short conversations
# Today's date would make other tokens of the same data every day; Llama 3.2's template has this one as its default.
_DATE = "26 Jul 2024"
_QUESTION, _ANSWER = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}
_SHORT = (
    [_QUESTION, _ANSWER],
    [_QUESTION],
    [{"role": "system", "content": "Be brief."}, _QUESTION, _ANSWER, _QUESTION, _ANSWER],
)


class TooMuch(Exception):
    """A template that takes more than the limits, in words."""


class _Code(compiler.CodeGenerator):
    """Leaves all computing to the rendering, whose limits are not there yet."""

    def _output_child_to_const(self, node: Any, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        """`a ~ b`, which Jinja joins by itself."""
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """As `transformers` has it, with a number of steps that are left."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self, max_steps: int):
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_refuse,
            strftime_now=lambda format: _DATE,
            range=self._range,
            dict=_Dict(),
            namespace=_Namespace,
        )
        self.max_steps = self.left = max_steps

    def spend(self, steps: int = 1) -> None:
        """Counts steps.

        Raises:
            TooMuch: there were too many.
        """
        self.left -= steps
        if self.left < 0:
            raise TooMuch(f"takes more than {self.max_steps:,} steps")

    def joined(self, parts: tuple[Any, ...]) -> str:
        """The parts as one text.

        Raises:
            TooMuch: it is too long.
        """
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operation.

        Raises:
            TooMuch: it is too large.
        """
        _check_length(_result_length(operator, left, right))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_number(left ** min(abs(right), 64))  # beyond the limit already, if it is not 0, 1 or -1
        result = super().call_binop(context, operator, left, right)
        _check_number(result)
        return result

    def _range(self, *arguments: int) -> range:
        numbers = safe_range(*arguments)
        self.spend(len(numbers))
        return numbers


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise TooMuch(f"makes a text or a list longer than {MAX_CHARACTERS >> 20} Mi")


def _check_number(value: Any) -> None:
    """Refuses an integer with which a short template would make a long text."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise TooMuch(f"computes with integers beyond {MAX_NUMBER:,}")


def _result_length(operator: str, left: Any, right: Any) -> int:
    """About how long a text or a list would be that an operation makes; 0: it makes something else."""
    lengths = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
    if operator == "+":
        return sum(lengths)
    if operator == "*":
        return sum(lengths) * sum(value for value in (left, right) if isinstance(value, int))
    if operator == "%" and isinstance(left, str):  # whose widths stand in the text, or in a tuple
        widths = [*map(int, re.findall(r"\d{1,18}", left)), *(right if isinstance(right, tuple) else [right])]
        return sum(width for width in widths if isinstance(width, int))
    return 0


class _Generation(jinja2.ext.Extension):
    """The tag around what an assistant says, which is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's

    def parse(self, parser: Any) -> nodes.Node:
        """The block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        """As `dict` has it."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*self_and_args: Any, **kwargs: Any):
        self, *args = self_and_args
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A template, compiled.

    Args:
        text: Jinja, as Hugging Face's tokenizers have it.
        variables: of every conversation, such as {"eos_token": "</s>"}.
        max_steps: turns of loops and calls of macros in one conversation.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
        TooMuch: a number in it is beyond the limits.
    """

    def __init__(self, text: str, variables: Mapping[str, str], max_steps: int):
        self._environment = _Environment(max_steps)
        self._variables = dict(variables)
        tree = self._environment.parse(text)
        for constant in tree.find_all(nodes.Const):
            _check_number(constant.value)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            counted = nodes.Call(nodes.EnvironmentAttribute("spend"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(counted).set_lineno(node.lineno))
        self._template = self._environment.from_string(tree.set_environment(self._environment))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, generation_prompt: bool = False
    ) -> str:
        """The text of a conversation, with the words that ask for the next answer if they are wanted.

        Raises:
            TooMuch: it takes more than the limits.
            Exception: whatever the template's own operations raise, `jinja2.TemplateError` where it refuses.
        """
        self._environment.left = self._environment.max_steps
        messages = [_with_thoughts(message) for message in messages]
        pieces, length = [], 0
        for piece in self._template.generate(
            **self._variables, messages=messages, tools=tools, documents=None, add_generation_prompt=generation_prompt
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise TooMuch(f"writes more than {MAX_CHARACTERS >> 20} Mi characters")
        return "".join(pieces)


def _with_thoughts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With its reasoning under the name that gpt-oss's template reads too, as `transformers` gives it."""
    thoughts = message.get("reasoning_content")
    return message if thoughts is None else {"thinking": thoughts, **message}


def described(error: Exception) -> str:
    """An error inside a template in words."""
    words = " ".join(str(error).split())[:300]
    return words if isinstance(error, jinja2.TemplateError) and words else f"{type(error).__name__}: {words}"


@functools.cache
def tried(text: str, variables: tuple[tuple[str, str], ...]) -> str | None:
    """Renders short conversations in a process of its own, within limits of time and memory; once for each template.

    Args:
        text: of the template.
        variables: the items of `ChatTemplate`'s.

    Returns:
        Why the template cannot be used, as the rest of a sentence; None: some conversations can be rendered with it.
    """
    command = [sys.executable, "-P", __file__]
    child = subprocess.run(command, input=json.dumps([text, dict(variables)]).encode(), capture_output=True)
    if child.returncode < 0:  # killed: its time was over, or it was too much for the interpreter
        return f"takes more than {MAX_SECONDS} s for short conversations"
    child.check_returncode()
    return json.loads(child.stdout)


def _try(text: str, variables: dict[str, str]) -> str | None:
    template = ChatTemplate(text, variables, MAX_SHORT_STEPS)
    outcomes = []
    for messages in _SHORT:
        try:
            template.render(messages, generation_prompt=messages[-1]["role"] == "user")
        except (TooMuch, MemoryError):
            raise
        except jinja2.TemplateError:
            outcomes.append(None)  # these conversations may lack what others have
        except Exception as error:  # anything may happen in there
            outcomes.append(f"fails: {described(error)}")
        else:
            outcomes.append(None)
    return None if None in outcomes else outcomes[0]


def _main() -> None:
    for kind, limit in ((resource.RLIMIT_CPU, MAX_SECONDS), (resource.RLIMIT_AS, MAX_BYTES)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        fault = _try(*json.load(sys.stdin))
    except MemoryError:
        fault = f"takes more than {MAX_BYTES >> 30} GiB of memory for short conversations"
    except TooMuch as error:
        fault = f"{error} for short conversations"
    except jinja2.TemplateSyntaxError as error:
        fault = f"is not valid: line {error.lineno}: {described(error)}"
    except Exception as error:  # what the compiler stumbles over: nesting, and constants, which it computes
        fault = f"is not valid: {described(error)}"
    print(json.dumps(fault))


if __name__ == "__main__":
    _main()
