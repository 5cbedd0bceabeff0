"""What megachat asks torch.cuda for, on a GPU; tests/unit/test_cuda_calls.py has the same calls with stand-ins."""

from pathlib import Path

import torch

from megachat import device as device_module
from megachat.checkpoint.saver import Saver
from megachat.doctor.installed import _torch_facts
from megachat.doctor.rank import matrix_rates
from megachat.parallel.work_time import WorkTime
from tests.gpu.fp8 import DEVICE
from tests.unit.checkpoint.test_checkpoint import ALONE, whole


def test_the_doctor_sees_and_measures_the_gpu(report):
    facts = _torch_facts()
    report("torch, cuDNN, NCCL and GPUs as the doctor sees them", facts)
    assert facts["torch_sees"] and facts["cudnn"] and facts["cudnn_error"] is None
    rates = matrix_rates(DEVICE)
    report("FLOPs per second of square products, by GPU", rates)
    assert len(rates) == torch.cuda.device_count() and min(rates) > 0


def test_properties_of_the_gpu(report):
    known = device_module.device_name(DEVICE), device_module.peak_flops(DEVICE), device_module.gpu_id(DEVICE)
    report("name, peak and identity", known)
    assert device_module.memory_bytes(DEVICE, 1) > device_module.peak_memory_bytes(DEVICE) >= 0


def test_random_numbers_continue():
    before = device_module.random_states(DEVICE)
    first = torch.randn(8, device=DEVICE)
    device_module.restore_random_states(before, DEVICE)
    assert torch.equal(torch.randn(8, device=DEVICE), first)


def test_the_time_of_work_leaves_out_waits():
    work, matrix = WorkTime(cuda=True), torch.randn(4096, 4096, device=DEVICE)

    def measured(waits: bool) -> float:
        work.start()
        with work.working():
            matrix @ matrix
            if waits:
                work.pause(launches=False)
            for _ in range(20):
                matrix @ matrix
            work.resume()
        torch.cuda.synchronize()
        return work.finish()

    measured(False)
    assert 0 < measured(True) < measured(False)


def test_a_save_has_the_values_from_when_it_began():
    weight, wrote = torch.zeros(1 << 22, device=DEVICE), []
    work = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(10):  # keeps the GPU busy, so that a copy that nobody waits for would come too late
        work = (work @ work).clamp(-1, 1)
    weight.add_(1)
    saver = Saver(ALONE)

    def write(pieces, axis):
        wrote.append(pieces["model/a"][1][0][2].clone())
        return Path("saved")

    saver.begin(whole({"model/a": weight}), write)
    weight.add_(1)
    saver.wait()
    assert (wrote[0] == 1).all() and wrote[0].device.type == "cpu"
