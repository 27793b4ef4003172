"""What docs/many-processes.md shows can be used: its recipe is one, its cluster's file fits together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from weitiao.recipe import make_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "many-processes.md").read_text(encoding="utf-8")


def test_the_recipes_shown_spread_the_weights_or_divide_what_learns() -> None:
    spread, divided, _cluster = yaml_blocks()
    assert make_recipe(yaml.safe_load(spread)).train.shard == "fsdp"
    assert make_recipe(yaml.safe_load(divided)).train.deepspeed == "ds_zero_2.json"


def test_the_pods_of_the_job_find_the_first_of_them_by_the_services_name() -> None:
    service, job = yaml.safe_load_all(yaml_blocks()[2])
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    options = dict(word.removeprefix("--").split("=", 1) for word in container["args"] if "=" in word)
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert options["master-addr"] == f"{name}-0.{pod['subdomain']}"
    assert int(options["master-port"]) == service["spec"]["ports"][0]["port"]
    assert spec["completionMode"] == "Indexed"
    assert int(options["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert options["node-rank"] == f"$({container['env'][0]['name']})"
    assert container["args"][-6:] == ["-m", "weitiao", "train", "recipe.yaml", "--resume", "auto"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def yaml_blocks() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
