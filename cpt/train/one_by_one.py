"""Models whose parameters get memory one at a time: built without any, then given to whoever cuts them up.

So a model that fits no single machine can be built on each; DeepSpeed's own ``zero.Init`` does the same while a model
is constructed, but casts its buffers too, which ruins rotary frequencies in bf16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class OneByOne(torch.nn.Module):
    """Gives the parameters of a model one at a time, each with memory on the device only from then on."""

    def __init__(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._parts = [model]  # in a list, so that it is no submodule
        self._device, self._dtype = device, dtype

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        given: dict[int, torch.nn.Parameter] = {}  # a tied parameter stays one object
        for module in self._parts[0].modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in given:
                    given[id(parameter)] = self._with_memory(parameter)
                    yield given[id(parameter)]
                module._parameters[name] = given[id(parameter)]

    def _with_memory(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if parameter.is_meta:
            values = torch.zeros(parameter.shape, dtype=self._dtype, device=self._device)
        else:
            values = parameter.data.to(self._device, self._dtype)
        return torch.nn.Parameter(values, requires_grad=parameter.requires_grad)


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside it modules are built with parameters on the meta device, shapes without memory; buffers are real."""
    register: Any = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
