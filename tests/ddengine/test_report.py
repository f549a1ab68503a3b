from ddengine.report import table_markdown, table_text, verdicts


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
