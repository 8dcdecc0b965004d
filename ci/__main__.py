"""Command line of the harness: `python -m ci --help`. The nox sessions are thin calls of it."""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import sys
from pathlib import Path

REMEDY = "run ci/nox, which brings it, or: pip install -r requirements-cpu.txt"

try:
    from ci import audit, document, engine_options, execute, forgery, outcome, runbook
    from ci.session import Session, clear_exit, offline, publish
except ModuleNotFoundError as error:
    print(f"ci: {error.name} is not installed for {sys.executable}; {REMEDY}", file=sys.stderr)
    raise SystemExit(78) from None  # the configuration code; ci.outcome may be what is missing

ROOT = Path(__file__).resolve().parent.parent
MORE = "after --: further pytest arguments, to look into a failure; a step run with them proves nothing"


def parser() -> argparse.ArgumentParser:
    """NSA_CI_* variables give the defaults; an option wins over its variable."""
    options = argparse.ArgumentParser(prog="python -m ci", description="The readiness harness.")
    options.add_argument("--profile", default=os.environ.get("NSA_CI_PROFILE", ""), help="default: the one that fits")
    options.add_argument("--steps", default=os.environ.get("NSA_CI_STEPS", runbook.SOURCE), help="a runbook.toml")
    options.add_argument("--root", default=os.environ.get("NSA_CI_ROOT", ROOT), help="where the commands run")
    commands = options.add_subparsers(dest="command", required=True)
    stage = commands.add_parser("stage", help="run one stage of the runbook")
    stage.add_argument("name")
    stage.add_argument("posargs", nargs="*", help=MORE)
    readiness = commands.add_parser("readiness", help="everything this machine can, then the report")
    readiness.add_argument("posargs", nargs="*", help=MORE)
    commands.add_parser("report", help="judge what has run, and write summary and bundle")
    commands.add_parser("preflight", help="is this machine fit for the profile?")
    book = commands.add_parser("runbook", help="print docs/runbook.md")
    book.add_argument("--write", action="store_true", help="write it, and the README's stage table")
    commands.add_parser("list", help="the sessions, as the runbook names them")
    engine_options.add_image(commands)
    engine_options.add_repro(commands)
    bundle = commands.add_parser("bundle", help="check a bundle")
    bundle.add_argument("action", choices=["verify", "canary"], help="canary: forge it, and expect a refusal each time")
    bundle.add_argument("files", type=Path, nargs="+", metavar="FILE")
    flow = commands.add_parser("workflow", help="run a workflow's jobs here, as .ci/run does")
    flow.add_argument("file", type=Path, metavar="FILE")
    flow.add_argument("--job", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    flow.add_argument(
        "--without", action="append", type=_pair, default=[], metavar="NAME=WHY", help="a job this machine cannot run"
    )
    flow.add_argument(
        "--matrix", action="append", type=_pair, default=[], metavar="KEY=VALUE", help="which entry of a matrix"
    )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; a user's mistake is one line on stderr and 2."""
    args = parser().parse_args(arguments)
    root = Path(args.root).resolve()
    try:
        book = runbook.load(Path(args.steps))
        if args.command == "runbook":
            return document.main(book, ROOT, write=args.write)
        if args.command == "list":
            return _list(book)
        if args.command == "bundle":
            return _verify(args.files) if args.action == "verify" else _canary(args.files)
        if args.command == "workflow":
            return _workflow(args)
        return _session(args, book, root)
    except (runbook.RunbookError, outcome.OutcomeError) as error:
        print(f"ci: {error}", file=sys.stderr)
        return outcome.USAGE


def _session(args: argparse.Namespace, book: runbook.Runbook, root: Path) -> int:
    tree = os.open(root, os.O_RDONLY)
    try:
        # Two sessions in one tree would judge each other's records; the lock goes with the process, however it ends.
        fcntl.flock(tree, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("ci: another session is running in this tree; wait for it, or use a clone of its own", file=sys.stderr)
        return outcome.INFRASTRUCTURE
    try:
        if args.command == "repro":
            fcntl.flock(tree, fcntl.LOCK_UN)  # the run that it starts takes it, if that is in this tree
        if args.command in ("image", "repro"):
            return _with_engine(args, book, root)
        return _locked_session(args, book, root)
    finally:
        os.close(tree)


def _with_engine(args: argparse.Namespace, book: runbook.Runbook, root: Path) -> int:
    try:
        from ci import engine_command, repro  # late: only these two need the Docker SDK
    except ModuleNotFoundError as error:
        print(f"ci: {error.name} is not installed for {sys.executable}; {REMEDY}", file=sys.stderr)
        return outcome.CONFIGURATION
    clear_exit(root)
    if args.command == "image":
        return engine_command.main(args, root, _say)
    return repro.main(args, book, root, _say)


def _say(line: str) -> None:
    print(line, flush=True)


def _list(book: runbook.Runbook) -> int:
    print(f"{'readiness':18} everything this machine can prove, then the report (the default)")
    for stage in book.stages:
        print(f"{stage.id:18} {stage.title}")
    print(f"{'preflight':18} is this machine fit for its profile?\n{'report':18} judge what has run")
    return outcome.READY


def _locked_session(args: argparse.Namespace, book: runbook.Runbook, root: Path) -> int:
    clear_exit(root)
    session = Session(
        book,
        root,
        wanted=args.profile,
        posargs=getattr(args, "posargs", []),
        offline=offline(),
        run_id=os.environ.get("NSA_CI_RUN_ID", ""),
        say=_say,
    )
    name = args.name if args.command == "stage" else args.command
    try:
        with execute.stoppable():
            code = _run(args, session, book)
    except execute.Stopped as stop:
        print(f"ci: {stop}: the running step was ended", file=sys.stderr, flush=True)
        code = session.finish(name, stop.code)
    if problem := publish(root):
        print(f"ci: {problem}", file=sys.stderr)
        return session.finish(name, outcome.CONFIGURATION)
    return code


def _run(args: argparse.Namespace, session: Session, book: runbook.Runbook) -> int:
    if args.command == "report":
        return session.report().exit_code
    stages = [args.name] if args.command == "stage" else [stage.id for stage in book.stages]
    for stage in stages:
        book.of_stage(stage)
    if args.command == "readiness":
        session.start_afresh()
    if (code := session.preflight()) or args.command == "preflight":
        return session.finish(getattr(args, "name", args.command), code)
    steps = [judged for stage in stages for judged in session.run_stage(stage)]
    if args.command == "readiness":
        return session.report(args.command).exit_code
    return session.close_stage(args.name, steps)


def _verify(paths: list[Path]) -> int:
    reports = [audit.verify(path) for path in paths]
    for report in reports:
        if len(reports) > 1:
            print(f"{report.path}:")
        print(report)
    return outcome.READY if all(report.ok for report in reports) else outcome.TEST_FAILED


def _canary(paths: list[Path]) -> int:
    accepted = 0
    for path in paths:
        try:
            lines = forgery.canary(path)
        except audit.Refused as refusal:
            print(f"ci: {refusal}", file=sys.stderr)
            return outcome.TEST_FAILED
        print("\n".join(lines))
        accepted += sum(line.endswith("ACCEPTED") for line in lines)
    return outcome.TEST_FAILED if accepted else outcome.READY


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _workflow(args: argparse.Namespace) -> int:
    from ci import workflow_run  # late: the rest of the harness needs no YAML

    try:
        with execute.stoppable():
            say = functools.partial(print, flush=True)
            choices, without = dict(args.matrix), dict(args.without)
            results = workflow_run.run(args.file, ROOT, jobs=args.job, choices=choices, say=say, without=without)
    except workflow_run.WorkflowError as error:
        print(f"ci: {error}", file=sys.stderr)
        return outcome.CONFIGURATION
    except execute.Stopped as stop:
        print(f"ci: {stop}: the running step was ended", file=sys.stderr)
        return stop.code
    print(f"\n{workflow_run.report(results)}")
    return outcome.TEST_FAILED if any(job.result in ("failure", "cancelled") for job in results) else outcome.READY


if __name__ == "__main__":
    sys.exit(main())
