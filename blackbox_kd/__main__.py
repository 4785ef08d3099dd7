"""`blackbox-kd STAGE ...`: each command is a module, imported only when it is asked for."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

COMMANDS = {
    "run": ("run", "sample, sft, onpolicy and evaluate in order, resumable"),
    "plan": ("plan", "what sample, onpolicy and evaluate would ask and cost; spends nothing"),
    "probe": ("probe", "what the endpoint can do, by about a dozen short calls"),
    "sample": ("sample", "ask the teacher, keep everything"),
    "curate": ("curate", "which of the teacher's answers sft will not learn, and why"),
    "sft": ("sft", "sequence-level stage: a LoRA student on the teacher's answers and top-logprobs"),
    "onpolicy": (
        "onpolicy",
        "the student writes, the teacher gives feedback, the student learns from its own samples",
    ),
    "evaluate": ("evaluate", "base, sft and each round on held-out, out-of-domain and hold-back prompts"),
    "report": ("report", "a run as one self-contained HTML page"),
    "sql": ("sql", 'ask the corpus: sql "select ..."'),
    "show": ("show", "one question with its answers, as a person reads them: show ID, --last N, --prompt TEXT"),
    "status": ("status", "what a run does right now, has done and spent"),
    "doctor": ("doctor", "check a corpus, and what to do"),
    "compact": ("compact", "rewrite a corpus without its dead space"),
    "export-corpus": ("export", "Parquet and chat JSONL that TRL and `datasets` load as they are"),
    "serve-teacher": ("serve", "the embedded local teacher as an OpenAI-compatible endpoint"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 2 your mistake, 3 the teacher refused, 130 interrupted)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: blackbox-kd COMMAND --config NAME_OR_FILE [--section.key value ...]\n")
        print("\n".join(f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items()))
        print("\n`blackbox-kd COMMAND --help` lists every key. Start with: blackbox-kd run --config quickstart")
        return 0
    if arguments[0] == "--version":
        from blackbox_kd import __version__

        print(__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}"
        print(f"error: no command {command!r}; {hint}", file=sys.stderr)
        return 2
    from blackbox_kd.progress import busy

    with busy(f"loading {command}"):  # the trainings bring torch and transformers: ten seconds
        module = import_module(f"blackbox_kd.{COMMANDS[command][0]}")
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
