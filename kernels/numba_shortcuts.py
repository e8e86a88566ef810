"""What numba does again and again while it compiles one kernel, done once. Build time only; the SPIR-V is the same."""

from __future__ import annotations

from functools import cache

from numba.core import base, compiler_machinery, ir, postproc, ssa, transforms, types
from numba.core.inline_closurecall import InlineWorker
from numba.core.runtime.context import NRTContext
from numba_dpex.kernel_api_impl.spirv.target import SPIRVTargetContext

_run_untyped_passes = InlineWorker.run_untyped_passes
_load_additional_registries = SPIRVTargetContext.load_additional_registries
_post_process = postproc.PostProcessor.run
_get_meminfos = NRTContext.get_meminfos
_rec_list_vars = ir.Inst._rec_list_vars
_forms = {}
_WITHOUT_VARIABLES = frozenset({str, int, float, bool, type(None), ir.Loc})


def _run_untyped_passes_once(self, func, enable_ssa=False):
    """The form of a function before its types are known, once for all places where it is inlined: each takes a copy."""
    self.flags.enable_ssa = enable_ssa
    if (func, enable_ssa) not in _forms:
        _forms[func, enable_ssa] = _run_untyped_passes(self, func, enable_ssa)
    return _forms[func, enable_ssa]


def _load_additional_registries_once(self):
    """All that numba-dpex implements: it would be added again whenever something new is looked up, to ever longer lists."""
    if self.__dict__.get("_loaded"):
        for registry in tuple(self._registries):
            self.install_registry(registry)  # what is new: intrinsics of the kernels
        return
    _load_additional_registries(self)
    self._loaded = True


def _post_process_in_short(self, emit_dels=False, extend_lifetimes=False):
    """What follows a pass. Between two of them, only generators and the interpreter ask which variables live where."""
    if emit_dels or self.func_ir.is_generator:
        _post_process(self, emit_dels, extend_lifetimes)
        return
    self.func_ir.blocks = transforms.canonicalize_cfg(self.func_ir.blocks)
    self.func_ir.variable_lifetime = postproc.VariableLifetime(self.func_ir.blocks)
    self.func_ir.generator_info = None


def _copy_scope(self, memo):
    """A scope with the same variables: it is copied with every block of a function."""
    scope = memo[id(self)] = ir.Scope(self.parent, self.loc)
    scope.localvars._con.update(self.localvars._con)
    scope.redefined.update(self.redefined)
    scope.var_redefinitions.update({name: set(versions) for name, versions in self.var_redefinitions.items()})
    return scope


def _get_few_meminfos(self, builder, ty, value):
    """What counts references in a value: it takes apart a tuple of numbers, in code that is of no use, only to find nothing."""
    return _get_meminfos(self, builder, ty, value) if _counts_references(self._context.data_model_manager, ty) else []


@cache
def _counts_references(models, ty):
    return models[ty].contains_nrt_meminfo()


def _list_variables(self, value):
    """The variables in a part of an instruction: most parts are one, or have none."""
    if type(value) is ir.Var:
        return [value]
    return [] if type(value) in _WITHOUT_VARIABLES else _rec_list_vars(self, value)


def _select_compatible(self, signature):
    """The implementations that fit a signature: of hundreds, those are tried whose first type fits."""
    if self.__dict__.get("_grouped", -1) != len(self.versions):
        self._grouped, self._groups = len(self.versions), {}
        for number, (formal, _) in enumerate(self.versions):
            self._groups.setdefault(formal[0] if formal else None, []).append(number)
    fitting = []
    for first, numbers in self._groups.items():
        if first is None or isinstance(first, types.VarArg) or (signature and self._match(first, signature[0])):
            fitting += numbers
    versions = [self.versions[number] for number in sorted(fitting)]
    return {formal: implementation for formal, implementation in versions if self._match_arglist(formal, signature)}


def take_shortcuts() -> None:
    """Replace the functions of numba 0.59, the last one for which numba-dpex was made."""
    InlineWorker.run_untyped_passes = _run_untyped_passes_once
    SPIRVTargetContext.load_additional_registries = _load_additional_registries_once
    postproc.PostProcessor.run = _post_process_in_short
    NRTContext.get_meminfos = _get_few_meminfos
    ir.Inst._rec_list_vars = _list_variables
    ir.Scope.__deepcopy__ = _copy_scope
    ir.Loc.__deepcopy__ = lambda self, memo: self
    base.OverloadSelector._select_compatible = _select_compatible
    ssa.pformat = compiler_machinery.pformat = lambda value: ""  # for debugging, and nobody reads them
