"""What is planned for streamed and for best evaluations, and for rows of other presets."""

from checkout import Checkout

STUDENT = {"train dmd2", "teacher", "latents", "shards", "features", "reference"}
BEST = {"samplers": {"best": {"kind": "few_step", "checkpoint": "best"}}}


def test_streamed_metrics_are_made_from_the_weights(fresh: Checkout):
    target = "results/smoke/dmd2/student/metrics.json"
    assert fresh.planned(target) == STUDENT | {"sample dmd2/student", "metrics dmd2/student"}
    streamed = {"evaluation": {"streamed": True}}
    assert fresh.planned(target, overlay=streamed) == STUDENT | {"metrics dmd2/student"}
    sheet = "results/smoke/teacher/ode/grid.png"
    jobs = {"shards", "latents", "teacher", "sample teacher/ode", "grid teacher/ode"}
    assert fresh.planned(sheet, overlay=streamed) == jobs


def test_best_is_chosen_by_the_curve(fresh: Checkout):
    chosen = {"curve dmd2", "select dmd2/best", "sample dmd2/best", "metrics dmd2/best"}
    assert fresh.planned("results/smoke/dmd2/best/metrics.json", overlay=BEST) == STUDENT | chosen


LAST = "  - {id: t3.floor,"
ROW = "  - {id: t3.other, group: Reference, method: Other, measure: teacher/sde, only: [PRESET]}\n"


def test_row_of_another_preset_is_not_planned(fresh: Checkout):
    for preset, planned in (("digits", False), ("smoke", True)):
        with fresh.edited("workflow/tables/table3.yaml", LAST, ROW.replace("PRESET", preset) + LAST):
            assert ("sample teacher/sde" in fresh.planned("results/table3.csv")) == planned


def test_row_of_a_preset_that_does_not_exist_stops_the_planning(fresh: Checkout):
    with fresh.edited("workflow/tables/table3.yaml", LAST, ROW.replace("PRESET", "diigts") + LAST):
        done = fresh.snakemake("results/table3.csv", "-n")
    assert done.returncode != 0
    assert "row t3.other: `only`: no preset 'diigts'; known: cifar10, digits" in done.stdout
    assert "Traceback" not in done.stdout
