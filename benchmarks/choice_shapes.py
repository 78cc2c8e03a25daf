"""Shapes for judging choices: batches that were not tuned, and others within the buckets of those that were."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from isokern.autotune.regret import lengths_in_bucket
from isokern.autotune.tuner import Task
from isokern.autotune.warmup import WarmupPlan, arch_of
from isokern.registry.ops.fused_sigmoid_gating.catalogue import model as lookup
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin, concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.lengths import LengthLayout
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Case, Phase, case_name

__all__ = ["held_out_cases", "sample_of", "task_of", "transfer_tasks"]


T = TypeVar("T")


def held_out_cases(count: int, most_tokens: int, seed: int = 0) -> list[Case]:
    """Batches as a server meets them, of any size: decode, one prompt beside decode rows, a prompt, several prompts."""
    draw = random.Random(seed)

    def size(low: int, high: int) -> int:
        return round(2 ** draw.uniform(*(x.bit_length() - 1 for x in (low, high))))

    found: dict[str, Case] = {}
    while len(found) < count:
        kind = draw.choices(("decode", "mixed", "prompt", "prompts"), (5, 3, 1, 1))[0]
        rows, prompt = size(1, min(256, most_tokens)), size(16, most_tokens)
        match kind:
            case "decode":
                phase, lengths = Phase.DECODE, [1] * rows
            case "mixed":
                phase, lengths = Phase.MIXED, [1] * min(rows, most_tokens) + [prompt]
            case "prompt":
                phase, lengths = Phase.PREFILL, [prompt]
            case _:
                n = size(2, 16)
                phase, lengths = Phase.PREFILL, [max(2, round(prompt / n * draw.uniform(0.4, 1.6))) for _ in range(n)]
        layout = LengthLayout.of_lengths(lengths)
        case = Case(case_name(phase, layout), phase, layout)
        found.setdefault(case.name, case)
    return list(found.values())


def transfer_tasks(plan: WarmupPlan, per_problem: int) -> list[Task]:
    """Other lengths of each problem of ``plan``, within its buckets and class; none where a bucket holds one only."""
    found = []
    for planned in plan.problems:
        recipe = planned.task.recipe
        seen = {recipe.case.lengths}
        for seed in range(per_problem):
            layout = lengths_in_bucket(planned.task.problem.profile, seed)
            if layout is None or layout.lengths() in seen:
                continue
            seen.add(layout.lengths())
            spec = recipe.case.but(name=f"{recipe.case.name} as {layout}"[:120], lengths=layout.lengths(), padded=())
            task = Task(replace(recipe, case=spec, twin=adversarial_twin(spec)), planned.task.problem)
            found.append(task)
    return found


def sample_of(tasks: Sequence[T], count: int, seed: int = 0) -> list[T]:
    """So many of ``tasks``, or all, at random."""
    return random.Random(seed).sample(tasks, min(count, len(tasks)))


def task_of(case: Case, plan: WarmupPlan, mode: str) -> Task:
    """The task of a case in ``plan``'s environment."""
    [(name, tp)] = plan.shards
    spec = concrete(lookup(name).shard(tp), case)
    template = plan.problems[0].task.recipe
    recipe = replace(template, case=spec, twin=adversarial_twin(spec), mode=mode)
    return Task(recipe, describe(spec, plan.environment.device, arch_of(plan.environment), recipe.mode))
