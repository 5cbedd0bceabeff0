"""Machines by name, the data file, and files of the user's own."""

import json

import pytest

from megachat.device import peak_of_name
from megachat.errors import UserError
from megachat.planning import hardware
from megachat.planning.hardware import known_gpu, load_hardware, parse_gpus


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [
        ("H100", 1, 1, "H100"),
        ("8xH100", 1, 8, "H100"),
        ("4x8xH100", 4, 8, "H100"),
        ("2 x 8 x a100", 2, 8, "A100-80"),
        ("16xH200", 2, 8, "H200"),
        ("8x4090", 1, 8, "RTX-4090"),
        ("1xRTX 4090", 1, 1, "RTX-4090"),
        ("8xNVIDIA H100 80GB HBM3", 1, 8, "H100"),
    ],
)
def test_names(text, nodes, per_node, name):
    machine = parse_gpus(text)
    assert (machine.nodes, machine.gpus_per_node, machine.gpu.name) == (nodes, per_node, name)
    assert machine.world == nodes * per_node
    assert parse_gpus(machine.name) == machine
    assert parse_gpus(f"{per_node}x{name}", nodes=nodes) == machine


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("8xH101", {}, "the near ones are H100"),
        ("lots", {}, "known are A100-40, .*H100"),
        ("8xQ7", {}, "known are A100-40"),
        ("0xH100", {}, "give 1 to"),
        ("12xH100", {}, "a node has 8 H100"),
        ("2x8xH100", {"nodes": 4}, "give one of the two"),
        ("--", {}, "is no machine"),
        ("8xH100", {"network": "Infiniband XDR"}, "near ones are InfiniBand NDR, InfiniBand HDR"),
    ],
)
def test_mistakes(text, options, message):
    with pytest.raises(UserError, match=message):
        parse_gpus(text, **options)


def test_every_entry_has_a_source_and_agrees_with_the_peaks_of_mfu():
    document = json.loads(hardware._HARDWARE_FILE.read_text())
    for kind in ("gpus", "links", "networks"):
        for name, entry in document[kind].items():
            assert len(entry["source"]) > 10, name
    for names in document["gpus"].values():
        for name in names["names"]:
            if peak := peak_of_name(name):
                assert known_gpu(name).flops["bfloat16"] == peak, name
    assert known_gpu("NVIDIA H100 80GB HBM3").name == "H100"
    assert known_gpu("NVIDIA H100 NVL") is None


def test_a_file_of_the_user_adds_a_gpu_and_mistakes_in_it_are_one_sentence(tmp_path):
    entry = json.loads(hardware._HARDWARE_FILE.read_text())["gpus"]["H100"] | {"names": [], "source": "measured"}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"format": 1, "gpus": {"X1": entry}}))
    assert parse_gpus("4xX1", spec=spec).gpu.source == "measured"
    with pytest.raises(UserError, match="X1 is no known GPU: .* to `megachat plan` by --gpu-spec FILE"):
        parse_gpus("4xX1")
    for number, (wrong, message) in enumerate(
        [
            ({"format": 2}, "format 2"),
            ({"format": 1, "gpus": {"X1": entry | {"memory_bytes": 0}}}, "no positive number"),
            ({"format": 1, "gpus": {"X1": entry | {"link": "none"}}}, "is not a hardware file"),
            ({"format": 1, "gpus": {"X1": entry | {"source": ""}}}, "no source"),
            ([], "is not a hardware file"),
        ]
    ):
        spec = tmp_path / f"{number}.json"
        spec.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            load_hardware(spec)
    with pytest.raises(UserError, match="cannot be read"):
        load_hardware(tmp_path / "none.json")
