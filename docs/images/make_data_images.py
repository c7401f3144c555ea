"""Draws the picture of a mixture in docs/data.md, with the verb's own code; needs no data.

    python -m docs.images.make_data_images

inspect.png beside it is a screenshot of the page that ``cpt data inspect --html`` writes, and not made here.
"""

from cpt.mix_fields import UpsampleEndMix
from cpt.mix_schedules import MixRequest, upsample_end
from cpt.plan import PlanSource, build_plan
from cpt.planner.picture_mix import draw_mix
from cpt.planner.preview_mix import mix_facts
from docs.images.make_planning_images import write

SEQ_LEN, BATCH_ROWS, STEPS, MAX_EPOCHS = 2048, 512, 2000, 4.0
ROWS = {"web": ("general", 3_000_000), "articles": ("domain", 400_000), "guidelines": ("domain", 25_000)}


def main() -> None:
    step_tokens = SEQ_LEN * BATCH_ROWS
    sources = tuple(
        PlanSource(name, group, rows, rows * SEQ_LEN, name)  # type: ignore[arg-type]
        for name, (group, rows) in ROWS.items()
    )
    request = MixRequest(sources, STEPS * step_tokens, BATCH_ROWS, step_tokens, 0.25, {})
    wishes = upsample_end(UpsampleEndMix(name="upsample_end", factors={"guidelines": 5}, final_fraction=0.15), request)
    shape = {"seed": 1, "seq_len": SEQ_LEN, "global_batch_rows": BATCH_ROWS, "max_epochs": MAX_EPOCHS}
    plan, warnings = build_plan(sources, wishes, **shape)  # type: ignore[arg-type]
    write("mix", draw_mix(mix_facts(plan, dict.fromkeys(ROWS, MAX_EPOCHS), warnings=warnings)))


if __name__ == "__main__":
    main()
