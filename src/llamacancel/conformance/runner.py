"""Runs scenarios one after another against one server, and says of each only what was seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from .bench import Bench, Broken, Missed, Unjudged
from .profile import Profile, ServerUnreachable, measure, measure_again
from .results import FAILED, PASSED, UNJUDGED, Report, Result, lanes_of
from .scenario import Scenario
from .scenarios import SCENARIOS
from .settings import Settings

__all__ = ["run_suite"]

_UNDISTURBED = "undisturbed"


async def run_suite(
    settings: Settings,
    *,
    only: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
    took: Callable[[Result], None] = lambda result: None,
    profile: Profile | None = None,
) -> Report:
    """Learn what the server is like and run the scenarios.

    Args:
        settings: What was asked for.
        only: Names of the scenarios to run; None for all.
        say: Takes lines about the progress.
        took: Takes each result as soon as it is there.
        profile: What the server is like, if that is known already.

    Raises:
        ServerUnreachable: There is no server, or none that gives completions.
        KeyError: There is no scenario of a name in `only`.
    """
    chosen = [SCENARIOS[name] for name in only] if only is not None else list(SCENARIOS.values())
    report = Report(f"{'https' if settings.target.tls else 'http'}://{settings.target.netloc}{settings.target.path}")
    report.settings = {"prefill (s)": settings.prefill, "rounds": settings.rounds, "seed": settings.seed}
    profile = profile or await measure(settings, say)
    report.profile = profile.describe()
    bench = Bench(settings, profile, say)

    gone = ""
    first = Scenario(_UNDISTURBED, "A server that nobody disturbs answers, alone and side by side.", _undisturbed)
    for scenario in [first, *chosen]:
        if gone:
            result = Result(scenario.name, scenario.claim, UNJUDGED, gone)
        else:
            say(f"{scenario.name}: {scenario.claim}")
            result = await _run(bench, scenario)
            if result.outcome != PASSED and not await bench.alive():
                gone = f"the server answered no more after {scenario.name}"
                if result.outcome != FAILED and scenario is not first:
                    result = Result(
                        scenario.name, scenario.claim, FAILED, f"{result.why}; {gone}", result.figures, result.seconds
                    )
            elif scenario is first and result.outcome != PASSED:
                gone = f"already undisturbed, the server does not answer reliably: {result.why}"
        if scenario is not first or result.outcome != PASSED:
            report.results.append(result)
            took(result)
        report.repeats = {"alone": bench.repeats_alone, "side by side": bench.repeats_beside}
    return report


async def _undisturbed(bench: Bench) -> dict[str, Any]:
    await bench.undisturbed()
    alone, beside = bench.repeats_alone, bench.repeats_beside
    bench.say(f"undisturbed answers repeat: alone {'yes' if alone else 'no'}, side by side {'yes' if beside else 'no'}")
    return {}


async def _run(bench: Bench, scenario: Scenario) -> Result:
    """Run one scenario, with longer work each time that its situation was missed."""
    began = bench.now()
    outcome, why, figures = UNJUDGED, "", {}
    bench.stretch = 1.0
    for attempt in range(bench.settings.tries):
        bench.acts.clear()
        try:
            figures = await scenario.run(bench)
            outcome, why = PASSED, ""
        except Missed as missed:
            why = f"the situation was not reached in {attempt + 1} tries: {missed}"
            bench.say(f"{scenario.name}: missed, once more with longer work ({missed})")
            await bench.close()
            bench.stretch *= 2
            with contextlib.suppress(ServerUnreachable):
                bench.profile = await measure_again(bench.profile, bench.settings, f"{scenario.name} {attempt}")
            continue
        except Broken as broken:
            outcome, why, figures = FAILED, str(broken), broken.figures
        except Unjudged as unjudged:
            outcome, why, figures = UNJUDGED, str(unjudged), unjudged.figures
        finally:
            await bench.close()
        break
    judged = [act for act in bench.acts if act.name == "hang-up"] or bench.acts
    lanes = lanes_of(judged[-1]) if judged else ()
    return Result(scenario.name, scenario.claim, outcome, why, figures, bench.now() - began, lanes)
