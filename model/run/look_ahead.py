"""Before a run is trusted to machines: --plan calculates it for others, --preflight measures these ones."""

from __future__ import annotations

import functools
import os

from halny.model.estimate.plan import Request, answer
from halny.model.exits import FAILED, FINISHED, Failed, Refused
from halny.model.run.inputs import open_data
from halny.model.run.preflight import Job, preflight
from halny.model.run.rank_process import RankProcess
from halny.model.run.ranks import agreed, anywhere, say, settle_on_host, start_distributed
from halny.model.run.recipe import Recipe
from halny.model.run.resolve import DTYPES, describe_sharding, model_config, resolve, saving_interval
from halny.model.run.watch import Watch


def plan_ahead(recipe: Recipe) -> int:
    """--plan: the run on another machine, calculated (estimate/plan.py). Starts nothing; returns an exit code."""
    if os.environ.get("RANK", "0") != "0":
        return FINISHED
    r = recipe
    if r.dtype == "fp32" or r.kernels == "reference":
        raise Refused(
            "--plan calculates a run in bf16 with our kernels; leave out --dtype fp32 and --kernels reference"
        )
    print(answer(plan_request(r), r.run_dir.with_name(f"{r.run_dir.name}-plan.png")))
    return FINISHED


def plan_request(recipe: Recipe) -> Request:
    """What --plan asks of estimate/plan.py, on the machine that the recipe names."""
    r = recipe
    return Request(
        model_config(r), r.batch_tokens, r.seq_len, r.micro_batch, r.steps, saving_interval(r),
        r.gpus or ("256" if r.moments == "fp32" else "1"),
        r.gpu or "gh200-96", r.nic_gbs or 25.0, r.gpus_per_node or 4, r.shard, r.replicate, r.reshard, r.moments,
        r.recompute, r.mtbf_hours,
    )  # fmt: skip


def look_before(recipe: Recipe, process: RankProcess) -> int:
    """--preflight: whether these machines are fit for this run, and how fast it will be (preflight.py)."""
    world = start_distributed(recipe.deadline)
    about_host = settle_on_host(world, recipe.numa, recipe.allow_old_nccl)
    spec = agreed(resolve, recipe, world)
    r, watch = spec.recipe, Watch(world, min(recipe.deadline, 60.0), recipe.run_dir, process.write_failure)
    process.run_begins(spec, watch)

    def stage(what: str) -> None:
        watch.at(what, long=True)
        if told := anywhere(process.stop_signal):
            raise Failed(f"the preflight was stopped by {told}")

    job = Job(spec.work, spec.layout, DTYPES[r.dtype], r.run_dir, r.keep)
    for line in (describe_sharding(spec), *about_host):
        say(world, line)
    opening = functools.partial(open_data, recipe.data, spec) if recipe.data else None
    return FINISHED if preflight(job, world, opening, functools.partial(say, world), stage) else FAILED
