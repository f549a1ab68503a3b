from ddengine.report import (
    by_class,
    cost_grid,
    costs,
    run_markdown,
    table_markdown,
    table_text,
    title,
    verdicts,
)


def row(name, network, mean, std, ci95, n=5):
    parts = {"images": 640, "labels": 10, "extras": 80, "total": 12345}
    head = {"name": name, "network": network, "metric": "accuracy", "mean": mean, "std": std, "n": n}
    return head | {"ci95": ci95, "values": [mean] * n, "steps": 500, "bytes": parts, "lr": 0.01}


TABLE = {
    "protocol": "standard-v1",
    "dataset": "digits",
    "seed": 7,
    "rows": [
        row("distilled", "convnet", 0.894, 0.0123, [0.88, 0.91]),
        row("random", "convnet", 0.63, 0.02, [0.60, 0.66]),
        row("distilled", "mlp", 0.5, 0.1, [0.38, 0.62]),
        row("random", "mlp", 0.55, 0.1, [0.43, 0.67]),
    ],
    "scores": {},
}


def test_text_table_shows_percent_interval_and_bytes_in_aligned_columns():
    lines = table_text(TABLE).splitlines()
    assert lines[0] == "digits, standard-v1, seed 7"
    body = lines[2:8]
    assert len({len(line) for line in body}) == 1
    assert " ".join(body[2].split()) == "distilled convnet 89.4 ± 1.2 88.0 to 91.0 5 0.01 500 12,345"


def test_markdown_table_has_one_line_per_row_and_equal_columns():
    lines = [line for line in table_markdown(TABLE).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(TABLE["rows"])
    assert {line.count("|") for line in lines} == {9}
    assert "| distilled | convnet | 89.4 ± 1.2 | 88.0 to 91.0 | 5 | 0.01 | 500 | 12,345 |" in lines


def test_verdict_says_distance_and_whether_intervals_are_apart():
    assert verdicts(TABLE) == [
        "distilled is 26.4 points above random on convnet: 95 % intervals apart",
        "distilled is 5.0 points below random on mlp: 95 % intervals overlap",
    ]


def test_one_network_has_no_spread_and_no_interval():
    single = TABLE | {"rows": [row(name, "mlp", 0.5, None, None, n=1) for name in ("distilled", "random")]}
    assert "±" not in table_text(single)
    assert verdicts(single) == ["distilled is 0.0 points above random on mlp: no intervals, one network each"]


def test_a_table_without_random_has_no_verdict():
    assert verdicts(TABLE | {"rows": TABLE["rows"][:1]}) == []


SCORED = {"hlr": 0.25, "ior": -0.125, "lrs": 0.26894, "ars": None}
PARTS = {
    "accuracies": {"subject": 0.5, "full": 0.75},
    "rows": {"subject": "distilled", "full": "full"},
    "weight": 0.5,
    "alpha": None,
    "missing": {"ars": ["random_plain", "distilled_plain"]},
}
SCORES = SCORED | {"network": "convnet", "components": PARTS}
SCORES |= {"networks": {"convnet": SCORED, "mlp": SCORED | {"ars": 0.5}}}


def words(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_scores_are_fractions_with_three_decimals_one_line_a_network():
    lines = words(table_text(TABLE | {"scores": SCORES}))
    at = lines.index("scores (fractions)")
    assert lines[at + 2] == "network HLR IOR LRS ARS"
    assert lines[at + 4 : at + 6] == ["convnet 0.250 -0.125 0.269 -", "mlp 0.250 -0.125 0.269 0.500"]
    assert "| mlp | 0.250 | -0.125 | 0.269 | 0.500 |" in table_markdown(TABLE | {"scores": SCORES})


def test_scores_come_with_what_they_were_computed_from_and_what_they_lack():
    lines = words(table_text(TABLE | {"scores": SCORES}))
    at = lines.index("components of the scores on convnet (fractions)")
    assert lines[at + 4 : at + 8] == [
        "subject distilled 0.500",
        "full full 0.750",
        "weight - 0.500",
        "ARS lacks random_plain, distilled_plain -",
    ]


def test_scores_of_one_network_alone_and_of_none():
    alone = words(table_text(TABLE | {"scores": SCORED | {"network": "vit"}}))
    assert "vit 0.250 -0.125 0.269 -" in alone
    none = TABLE | {"scores": dict.fromkeys(SCORED) | {"components": PARTS, "network": "vit"}}
    assert table_text(none) == table_text({k: v for k, v in TABLE.items() if k != "scores"})


def test_calibration_worst_class_and_robustness_are_a_table_of_their_own_in_percent():
    rows = [TABLE["rows"][0] | {"ece": 0.0625, "worst_class": 0.25, "robust": {"blur": 0.5, "pgd": 0.0}}]
    rows += [TABLE["rows"][1] | {"ece": 0.125, "robust": {"blur": 0.25}}, TABLE["rows"][2]]
    lines = words(table_text(TABLE | {"rows": rows}))
    at = lines.index("calibration, worst class and robustness (%)")
    assert lines[at + 2] == "set network ECE worst class blur pgd"
    assert lines[at + 4 :] == ["distilled convnet 6.2 25.0 50.0 0.0", "random convnet 12.5 - 25.0 -"]


def test_classes_have_a_column_for_each_network_and_numbers_where_names_do_not_fit():
    rows = [TABLE["rows"][0] | {"per_class": [0.5, None]}, TABLE["rows"][1] | {"per_class": [1.0, 1.0]}]
    rows += [TABLE["rows"][2] | {"per_class": [0.25, 0.75]}]
    grid = by_class({"rows": rows}, ("ant", "bee"))
    assert grid.head == ("class", "convnet %", "mlp %")
    assert [[shown for shown, _ in row] for row in grid.rows] == [
        ["ant", "50.0", "25.0"],
        ["bee", "-", "75.0"],
    ]
    assert [row[0][0] for row in by_class({"rows": rows}, ("ant",)).rows] == ["class 0", "class 1"]
    assert by_class(TABLE) is None


BUDGET = {"images": 640, "labels": 10, "extras": 80, "total": 730, "preprocessing": 0, "ipc": 1}
MADE = {"budget": BUDGET, "provenance": {"seconds": 1.25, "peak_memory_bytes": 3 << 20}}


def test_costs_have_bytes_by_part_and_distillation_only_for_the_set():
    first, second = costs({"set": MADE, "table": TABLE | {"rows": TABLE["rows"][:2]}})
    assert first["bytes"] == {"images": 640, "labels": 10, "extras": 80, "total": 12345}
    assert (first["distil_seconds"], first["peak_memory_bytes"]) == (1.25, 3145728)
    assert (second["distil_seconds"], second["peak_memory_bytes"]) == (None, None)
    lines = words(cost_grid([first, second]).text())
    assert (
        lines[0] == "set network images bytes labels bytes extras bytes total bytes distil s peak MiB train s"
    )
    assert lines[2:] == [
        "distilled convnet 640 10 80 12,345 1.2 3.0 -",
        "random convnet 640 10 80 12,345 - - -",
    ]


def test_costs_of_a_set_without_table_and_of_nothing():
    (alone,) = costs({"set": MADE, "table": None})
    assert alone["bytes"] == {"images": 640, "labels": 10, "extras": 80, "total": 730}
    assert (alone["network"], alone["train_seconds"]) == (None, None)
    assert costs({"set": None, "table": None}) == []


def test_the_markdown_of_a_run_has_its_costs():
    identity = {"matcher": {"type": "m"}, "dataset": {"name": "d", "shape": [1, 2, 3]}, "budget": None}
    run = {"path": "r", "run": identity, "table": None, "set": None, "curves": {}}
    assert "**cost**" not in run_markdown(run)
    made = MADE | {
        "recipe": {},
        "dataset": {"classes": ["a"]},
        "count": 1,
        "kind": "pixels",
        "y_kind": "class",
    }
    lines = run_markdown(run | {"set": made}).splitlines()
    assert "| distilled | - | 640 | 10 | 80 | 730 | 1.2 | 3.0 | - |" in lines


def test_a_table_whose_weights_were_chosen_on_the_test_part_says_so():
    chosen = TABLE | {"protocol": "paper/dm", "protocol_spec": {"select": "best on test"}}
    assert title(chosen) == "digits, paper/dm, seed 7, weights chosen on the test part"
    assert title(TABLE | {"protocol_spec": {"select": "last step"}}) == "digits, standard-v1, seed 7"


def test_texts_keep_to_their_line_and_markdown_has_no_tags():
    bad = TABLE | {"dataset": "a\nb<i>", "rows": [row("x|\n<b>", "mlp", 0.5, None, None, n=1)]}
    assert "a\\nb<i>, standard-v1, seed 7" in table_text(bad).splitlines()
    assert (
        "| x\\|\\\\n&lt;b> | mlp | 50.0 | - | 1 | 0.01 | 500 | 12,345 |" in table_markdown(bad).splitlines()
    )
