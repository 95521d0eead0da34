"""Talk to a model with the chat template it was trained on.

    python python/chat.py --model outputs-dpo/tiny/model
    python python/chat.py --model http://127.0.0.1:8000/v1#dpo
    echo "What is a normal body temperature?" | python python/chat.py --model dpo

The model is a folder, BASE+ADAPTER, a finished stage's name, or a server that speaks OpenAI's API (its key: API_KEY).
On a terminal: answers as they are written, with history; /help lists the commands, Ctrl-C cuts an answer short, Ctrl-D
ends. Otherwise the whole input is one question, and standard output holds the answer alone.
"""

import contextlib
import sys
from dataclasses import dataclass, field

from stagecraft import naming
from stagecraft.arguments import DTYPES, parse
from stagecraft.errors import UserError, run_main
from stagecraft.places import Place
from stagecraft.talk import sources
from stagecraft.talk.terminal import Talk, system_message


@dataclass
class ChatArguments:
    """Chat"""

    model: str | None = field(
        default=None,
        metadata={
            "help": "a model's folder, BASE+ADAPTER, a stage's name, or URL[#MODEL] [the newest finished stage]",
            "aliases": ["model_name_or_path"],
        },
    )
    recipe: str = field(default_factory=naming.default_recipe, metadata={"help": "whose stages are meant"})
    system: str | None = field(default=None, metadata={"help": "system message"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens of an answer at most"})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy: the same answer every time"})
    torch_dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the weights (not of a server's)", "choices": DTYPES},
    )


def main() -> None:
    [args] = parse(__doc__, ChatArguments)
    question = None if sys.stdin.isatty() else read_question()
    place = check(args)
    source = open_quietly(place, args.torch_dtype)
    if question is not None:
        messages = [*system_message(args.system), {"role": "user", "content": question}]
        print("".join(source.stream(messages, args.max_new_tokens, args.temperature)))
        return

    def open_place(word: str, flag: str) -> sources.Source:
        return open_quietly(naming.find(word, args.recipe, flag), args.torch_dtype)

    Talk(source, open_place, args.system, args.max_new_tokens, args.temperature, args.recipe).run()


def open_quietly(place: Place, dtype: str) -> sources.Source:
    """A source of answers. Some libraries greet on standard output when imported."""
    with contextlib.redirect_stdout(sys.stderr):
        return sources.open_source(place, dtype)


def check(args: ChatArguments) -> Place:
    """Which model is meant. Raises UserError listing what is wrong with the flags, before anything is loaded."""
    faults = []
    if args.max_new_tokens < 1:
        faults.append(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 <= args.temperature < float("inf"):
        faults.append(f"--temperature must be 0 (greedy) or more, not {args.temperature}")
    try:
        place = naming.find(args.model or naming.newest(args.recipe, 1)[0], args.recipe, "--model")
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError(*faults)
    return place


def read_question() -> str:
    """The whole of standard input."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start + 1}); send UTF-8 text") from None
    if not text:
        raise UserError(
            'standard input is empty: pipe a question in (echo "..." | python python/chat.py ...)'
        )
    return text


if __name__ == "__main__":
    run_main(main)
