"""What a driver's compiler says of a module that it refuses. dpctl drops it: the driver is asked again, by its C interface."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LINES = 20  # the last ones: in front of the reason stand remarks on every loop
_DEVICE_NAME, _BUILD_LOG, _ALL_DEVICES = 0x102B, 0x1183, c_uint64(0xFFFFFFFF)  # of cl.h
_PROPERTIES, _CONTEXT, _MODULE = 0x3, 0xD, 0x1B  # ze_structure_type_t


class _Context(ctypes.Structure):
    _fields_ = (("type", c_uint32), ("next", c_void_p), ("flags", c_uint32))


class _Module(ctypes.Structure):
    _fields_ = (
        *(("type", c_uint32), ("next", c_void_p), ("format", c_uint32), ("size", c_size_t), ("input", c_char_p)),
        *(("flags", c_char_p), ("constants", c_void_p)),
    )


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("next", c_void_p),
        ("numbers", c_uint8 * 96),
        ("name", c_char * 256),
        ("room", c_uint8 * 128),
    )


def build_log(device: Any, spirv: bytes, flags: str) -> str:
    """The end of what the compiler says of a module, on a SYCL device; "" where the driver does not tell."""
    ask = {"opencl": _of_opencl, "level_zero": _of_level_zero}.get(device.backend.name)
    try:
        log = ask(device.name, spirv, flags.encode()) if ask else ""
    except (OSError, AttributeError):  # no such library, or one without these functions
        return ""
    return "\n".join([line for line in log.splitlines() if line.strip()][-LINES:])


def _text(ask: Callable[[Any, Any], Any]) -> str:
    """What a function writes that takes room, as a size, and a place; it tells the size where there is no place."""
    size = c_size_t()
    ask(size, None)
    text = ctypes.create_string_buffer(size.value + 1)
    ask(size, text)
    return text.value.decode(errors="replace")


def _of_opencl(name: str, spirv: bytes, flags: bytes) -> str:
    cl = ctypes.CDLL("libOpenCL.so.1")
    cl.clCreateContext.restype = cl.clCreateProgramWithIL.restype = c_void_p

    def found(ask: Callable[..., int], *of: Any) -> list[c_void_p]:
        count = c_uint32()
        ask(*of, 0, None, byref(count))
        handles = (c_void_p * count.value)()
        ask(*of, count, handles, None)
        return [c_void_p(handle) for handle in handles]

    def name_of(device: c_void_p) -> str:
        text = ctypes.create_string_buffer(1024)
        cl.clGetDeviceInfo(device, _DEVICE_NAME, c_size_t(len(text)), text, None)
        return text.value.decode(errors="replace")

    devices = [x for platform in found(cl.clGetPlatformIDs) for x in found(cl.clGetDeviceIDs, platform, _ALL_DEVICES)]
    device = next((x for x in devices if name_of(x) == name), None)
    if device is None:
        return ""
    code = c_int()
    context = c_void_p(cl.clCreateContext(None, 1, byref(device), None, None, byref(code)))
    program = c_void_p(cl.clCreateProgramWithIL(context, spirv, c_size_t(len(spirv)), byref(code)))
    if not program:
        cl.clReleaseContext(context)
        return ""
    cl.clBuildProgram(program, 1, byref(device), flags, None, None)

    def log(size: c_size_t, place: Any) -> None:
        cl.clGetProgramBuildInfo(program, device, _BUILD_LOG, size, place, byref(size))

    text = _text(log)
    cl.clReleaseProgram(program)
    cl.clReleaseContext(context)
    return text


def _of_level_zero(name: str, spirv: bytes, flags: bytes) -> str:
    ze = ctypes.CDLL("libze_loader.so.1")
    ze.zeInit(0)

    def found(ask: Callable[..., int], *of: Any) -> list[c_void_p]:
        count = c_uint32()
        ask(*of, byref(count), None)
        handles = (c_void_p * count.value)()
        ask(*of, byref(count), handles)
        return [c_void_p(handle) for handle in handles]

    def name_of(device: c_void_p) -> str:
        properties = _Properties(_PROPERTIES)
        ze.zeDeviceGetProperties(device, byref(properties))
        return str(properties.name.decode(errors="replace"))

    devices = [(driver, x) for driver in found(ze.zeDriverGet) for x in found(ze.zeDeviceGet, driver)]
    driver, device = next((x for x in devices if name_of(x[1]) == name), (None, None))
    if device is None:
        return ""
    context, module, log = c_void_p(), c_void_p(), c_void_p()
    ze.zeContextCreate(driver, byref(_Context(_CONTEXT)), byref(context))
    ze.zeModuleCreate(context, device, byref(_Module(_MODULE, None, 0, len(spirv), spirv, flags)), byref(module), byref(log))
    text = _text(lambda size, place: ze.zeModuleBuildLogGetString(log, byref(size), place))
    ze.zeModuleBuildLogDestroy(log)
    if module:  # what dpctl did not get, for a reason of its own
        ze.zeModuleDestroy(module)
    ze.zeContextDestroy(context)
    return text
