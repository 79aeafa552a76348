"""`Parallel(backend="run_once")`: a joblib backend that computes each call once, on any machine.

It wraps another backend (`inner`), which runs what has to be run. Each item of a batch is claimed,
run, stored and completed by itself; calls that are done elsewhere come back without being run, and
calls in flight elsewhere are waited for without a worker.

joblib keeps one backend instance per context and lets many `Parallel` use it, one inside the other
or side by side. So the instance a user makes is only a template: `configure` answers with joblib's
own fallback to an instance bound to that one `Parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, Final

from joblib.parallel import BACKENDS, FallbackToBackend, ParallelBackendBase, ThreadingBackend

from run_once.errors import ConfigError
from run_once.joblib_call import BoundCall
from run_once.joblib_jobs import Job
from run_once.joblib_options import OPTION_NAMES, BackendOptions, make_options, split_options
from run_once.joblib_worker import is_inside_task

_INNER_ATTRIBUTES: Final = frozenset(
    {
        "_DEFAULT_EFFECTIVE_BATCH_SIZE",
        "_DEFAULT_SMOOTHED_BATCH_DURATION",
        "_effective_batch_size",
        "_pool",
        "_smoothed_batch_duration",
        "_workers",
    }
)


class RunOnceBackend(ParallelBackendBase):
    """The joblib backend; see the module's docstring and `BackendOptions`."""

    supports_retrieve_callback = True
    is_run_once = True

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **options: Any,
    ) -> None:
        """Make a template; joblib calls this.

        Args:
            nesting_level: joblib's.
            inner_max_num_threads: joblib's; for inner backends that support it.
            **options: Those of `BackendOptions`; any other goes to the inner backend.

        Raises:
            ConfigError: An option has a value that cannot be.
        """
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        ours, self._inner_options = split_options(options)
        self.options = make_options(ours)
        self._probe = self._make_inner()
        self._bound: BoundCall | None = None

    # -- what joblib asks of any backend -----------------------------------------------------------

    @property
    def supports_return_generator(self) -> bool:
        """As the inner backend does."""
        return bool(self._probe.supports_return_generator)

    @property
    def supports_inner_max_num_threads(self) -> bool:
        """As the inner backend does."""
        return bool(self._probe.supports_inner_max_num_threads)

    @property
    def supports_sharedmem(self) -> bool:
        """As the inner backend does; such calls are run plainly."""
        return bool(getattr(self._probe, "supports_sharedmem", False))

    @property
    def supports_timeout(self) -> bool:
        """Several jobs can be timed out, one cannot: joblib then warns, as it does by itself."""
        return self._bound is None or not self._bound.is_sequential

    @property
    def uses_threads(self) -> bool:
        """As the inner backend does."""
        return bool(getattr(self._probe, "uses_threads", False))

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Give the number of workers that the inner backend would use."""
        inner = self._bound.inner if self._bound else self._probe
        inner.nesting_level = self.nesting_level
        return int(inner.effective_n_jobs(n_jobs))

    def configure(self, n_jobs: int = 1, parallel: Any = None, **backend_kwargs: Any) -> int:
        """Prepare one `Parallel`; the template falls back to an instance bound to it.

        Raises:
            FallbackToBackend: joblib's way to exchange a backend.
            ConfigError: An option or the server's address cannot be used.
        """
        if is_inside_task() or backend_kwargs.get("require") == "sharedmem":
            _spare_our_options(parallel)
            raise FallbackToBackend(self._plain(backend_kwargs))
        ours, inner_kwargs = split_options(backend_kwargs)
        if self._bound is None:
            bound = self._bind(ours, parallel)
            _spare_our_options(parallel)  # an inner backend that restarts its pool takes the rest
            raise FallbackToBackend(bound)
        return self._bound.configure(n_jobs, parallel, self.options, inner_kwargs)

    def start_call(self) -> None:
        """Begin one call of the `Parallel`."""
        self._require_bound().start_call()

    def stop_call(self) -> None:
        """End one call of the `Parallel`."""
        self._require_bound().stop_call()

    def submit(self, func: Any, callback: Callable[[Job], None] | None = None) -> Job:
        """Queue a batch; joblib holds its lock, so nothing is asked of the server here."""
        return self._require_bound().submit(func, callback)

    apply_async = submit  # its name in joblib 1.4

    def retrieve_result_callback(self, out: Job) -> list[Any]:
        """Give a batch's values, all of which are here already."""
        return out.values()

    def compute_batch_size(self) -> int:
        """Give the inner backend's size, or a larger one while calls turn out to be done."""
        return self._require_bound().compute_batch_size() if self._bound else 1

    def batch_completed(self, batch_size: int, duration: float) -> None:
        """Do nothing: the inner backend learns from what it has run itself, hits kept out."""

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Stop all work and free what the workers held."""
        self._require_bound().abort(ensure_ready=ensure_ready)

    def terminate(self) -> None:
        """End what `configure` began."""
        if self._bound is not None:
            self._bound.terminate()

    def get_nested_backend(self) -> Any:
        """Give the inner backend's choice: nested calls are neither claimed nor kept."""
        inner = self._bound.inner if self._bound else self._probe
        return inner.get_nested_backend()

    def retrieval_context(self) -> AbstractContextManager[Any]:
        """As the inner backend does."""
        inner = self._bound.inner if self._bound else self._probe
        context: AbstractContextManager[Any] = inner.retrieval_context()
        return context

    def __getattr__(self, name: str) -> Any:
        """Show the inner backend's workers and statistics under the names joblib gives its own."""
        if name in _INNER_ATTRIBUTES:
            inner = self._bound.inner if self._bound else self._probe
            return getattr(inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- our own -----------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as a template: threads and connections stay behind."""
        options = {
            field.name: getattr(self.options, field.name) for field in fields(BackendOptions)
        }
        arguments = {**self._inner_options, **options}
        return _rebuild, (self.nesting_level, self.inner_max_num_threads, arguments)

    def _bind(self, ours: dict[str, Any], parallel: Any) -> RunOnceBackend:
        """Give a backend for one `Parallel`, whose own options come before the template's."""
        bound = RunOnceBackend.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound.options = replace(self.options, **ours) if ours else self.options
        bound._probe = bound._make_inner()
        # joblib asked the template, which did not know of inner=... among Parallel's arguments.
        is_generator = getattr(parallel, "return_generator", False)
        if is_generator and not bound.supports_return_generator:
            msg = f"inner={bound.options.inner!r} does not support return_as={parallel.return_as!r}"
            raise ValueError(msg)
        bound._bound = BoundCall(bound._probe)
        return bound

    def _make_inner(self, instead: str | ParallelBackendBase | None = None) -> Any:
        inner = self.options.inner if instead is None else instead
        if isinstance(inner, ParallelBackendBase):
            if inner.nesting_level is None:
                inner.nesting_level = self.nesting_level
            return inner
        arguments = dict(self._inner_options)
        if self.inner_max_num_threads is not None:
            arguments["inner_max_num_threads"] = self.inner_max_num_threads
        try:
            backend = BACKENDS[inner](**arguments)
        except TypeError as error:
            known = ", ".join(sorted(OPTION_NAMES))
            raise ConfigError(
                f"the inner backend {inner!r} does not take {sorted(arguments)}: {error}; "
                f"options of run_once are: {known}"
            ) from error
        backend.nesting_level = self.nesting_level
        if not backend.supports_retrieve_callback:
            msg = f"inner={inner!r} has no retrieve_result_callback, which run_once needs"
            raise ConfigError(msg)
        return backend

    def _plain(self, backend_kwargs: dict[str, Any]) -> Any:
        """Give a backend that runs calls without claiming them."""
        inner = self._make_inner(backend_kwargs.get("inner"))
        needs_threads = backend_kwargs.get("require") == "sharedmem"
        if needs_threads and not getattr(inner, "supports_sharedmem", False):
            inner = ThreadingBackend(nesting_level=self.nesting_level)
        return inner

    def _require_bound(self) -> BoundCall:
        if self._bound is None:
            msg = "the backend is not configured; joblib does that when Parallel is called"
            raise RuntimeError(msg)
        return self._bound


def _spare_our_options(parallel: Any) -> None:
    """Take our options from those that joblib is about to give to another backend."""
    for name in ("_backend_kwargs", "_backend_args"):  # the name depends on joblib's version
        options = getattr(parallel, name, None)
        if isinstance(options, dict):
            setattr(parallel, name, {k: v for k, v in options.items() if k not in OPTION_NAMES})


def _rebuild(
    nesting_level: int | None, inner_max_num_threads: int | None, options: dict[str, Any]
) -> RunOnceBackend:
    return RunOnceBackend(
        nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads, **options
    )
