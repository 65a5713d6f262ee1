"""llama.cpp's log goes to Python's logging and nowhere else."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from llamacancel.commands.make_model import cached_model

USE = """
import sys
import llamacancel as lc
model = lc.Model.load(sys.argv[1])
with model.context(n_ctx=64, n_threads=1, n_ubatch=16) as context:
    batch = lc.Batch(4)
    batch.add_sequence([1, 2, 3])
    context.decode(batch)
    lc.Sampler(seed=1).sample(context)
    context.state.load(0, context.state.save(0))
try:
    lc.Model.load(__file__ if "__file__" in globals() else sys.executable)
except lc.ModelLoadError:
    pass
try:
    lc.Sampler(grammar="root ::= root", model=model)
except ValueError:
    pass
model.close()
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(cached_model("llama", "tiny"))]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_without_logging_nothing_is_written() -> None:
    result = run(USE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_importing_writes_nothing_and_leaves_logging_as_it_was() -> None:
    result = run("""
        import logging
        before = logging.getLogger().handlers[:]
        import llamacancel
        assert logging.getLogger().handlers == before
        assert logging.getLogger("llamacancel.llama").level == logging.NOTSET
        assert not logging.getLogger("llamacancel").handlers
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_llama_cpps_lines_reach_their_logger_with_their_levels() -> None:
    before = """
import logging
records = []

class Keep(logging.Handler):
    def emit(self, record):
        records.append(record)

logger = logging.getLogger("llamacancel.llama")
logger.setLevel(logging.DEBUG)
logger.addHandler(Keep())
"""
    after = """
assert {record.name for record in records} == {"llamacancel.llama"}
assert any("llama_model_loader" in record.getMessage() for record in records)
assert any("llama_context" in record.getMessage() for record in records)
assert logging.INFO in {record.levelno for record in records}
assert any(record.levelno == logging.ERROR for record in records)
assert all(record.getMessage() == record.getMessage().rstrip() for record in records)
"""
    result = run(before + USE + after)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("level", ["DEBUG", "ERROR"])
def test_a_handler_of_the_roots_gets_the_lines_too(level: str) -> None:
    before = f"""
import logging
import sys
logging.basicConfig(level=logging.{level}, stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
"""
    result = run(before + USE)
    assert result.returncode == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert ("llamacancel.llama INFO" in result.stdout) == (level == "DEBUG")
    assert any(line.startswith("llamacancel.llama ERROR") for line in lines)


def test_what_a_filter_raises_takes_nothing_from_the_call() -> None:
    result = run("""
        import logging, sys
        import llamacancel as lc
        raised = []
        sys.unraisablehook = lambda told: raised.append(str(told.exc_value))
        logger = logging.getLogger("llamacancel.llama")
        logger.setLevel(1)
        def broken(record):
            raise RuntimeError("a filter")
        logger.addFilter(broken)
        with lc.Model.load(sys.argv[1]) as model, model.context(n_ctx=64, n_threads=1) as context:
            batch, token = lc.Batch(4), lc.CancelToken()
            batch.add_sequence([1, 2, 3])
            context.decode(batch)
            token.cancel("gone")
            try:
                context.state.save(0, token)
            except lc.DecodeCancelled as error:
                print(error.reason, set(raised))
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "gone {'a filter'}\n", "")
