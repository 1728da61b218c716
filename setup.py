"""Builds normfuse/_C.abi3.so against the installed torch, with the CUDA kernels inside when there is an nvcc.

Beside it normfuse/_autograd, which only the torch that it was built with can load; others do without.

Read from the environment:
    NORMFUSE_CUDA        build the CUDA kernels: "auto" (default: if there is an nvcc), "0" never, "1" or fail
    NORMFUSE_CUDA_ARCHS  architectures, default "80;90;100;120+PTX"; +PTX also serves architectures to come
    NORMFUSE_SANITIZE    "1": the library on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer, alone
    MAX_JOBS             compilers at a time, default: as many as there are cores
    CUDA_HOME            root of the CUDA toolkit; default: where the nvcc on the PATH is
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "normfuse is built against the torch you use, and no torch is installed here. Install it, then run\n"
        "    pip install --no-build-isolation -e ."
    )

ROOT = Path(__file__).parent.resolve()
PYTHON_SIDE = ROOT / "normfuse" / "_native.py"


def sources(folder: str, pattern: str) -> list[Path]:
    """The files of a folder below csrc; there must be some, or the library would be built without them."""
    found = sorted((ROOT / "csrc" / folder).glob(pattern))
    if not found:
        sys.exit(f"csrc/{folder} has no {pattern}: the source distribution is incomplete.")
    return found


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


HEADERS = sources("", "*.h") + sources("cuda", "*.cuh") + sources("cpu", "*.h")
CUDA_SOURCES = sources("cuda", "*.cu")
TORCH_TARGET = 0x020B000000000000  # 2.11, the oldest torch whose stable ABI the bindings use
# The first error ends the process.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZED = os.environ.get("NORMFUSE_SANITIZE") == "1"
COMPILED_FOR = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS] if SANITIZED else ["-O3", "-g0"]
LINKED_FOR = SANITIZERS if SANITIZED else ["-s"]


def find_cuda() -> Path | None:
    """The toolkit's root, None if CUDA is switched off or missing; exits if it is demanded and missing."""
    wish = os.environ.get("NORMFUSE_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"NORMFUSE_CUDA is {wish!r}; it must be auto, 0 or 1.")
    if wish == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in (Path(c) for c in candidates if c):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    if wish == "1":
        sys.exit("NORMFUSE_CUDA=1, but there is no CUDA toolkit. Set CUDA_HOME to its root or put nvcc on the PATH.")
    return None


def architectures() -> list[str]:
    return [a for a in os.environ.get("NORMFUSE_CUDA_ARCHS", "80;90;100;120+PTX").split(";") if a]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if number != arch:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Build(BuildExtension):
    def run(self):
        super().run()
        self.write_facts(find_cuda())

    def build_extension(self, ext):
        if ext.name != "normfuse._C":
            super().build_extension(ext)
            return
        home = find_cuda()
        if home:
            ext.extra_objects += self.compile_cuda(home)
            ext.extra_compile_args["cxx"].append("-DNORMFUSE_WITH_CUDA")
            ext.extra_link_args += [f"-L{home}/lib64", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        else:
            self.announce_without_cuda()
        super().build_extension(ext)

    def compile_cuda(self, home: Path) -> list[str]:
        """Compiles the .cu files whose object is older than a source, a header or the command line."""
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        base = [f"{home}/bin/nvcc", "-O3", "-std=c++17"]
        base += ["-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(architectures())]
        command_file = folder / "command.txt"
        if not command_file.exists() or command_file.read_text() != " ".join(base):
            command_file.write_text(" ".join(base))
        longest_first = sorted(CUDA_SOURCES, key=lambda path: -path.stat().st_size)  # the last ones leave cores idle
        targets = {source: folder / f"{source.stem}.o" for source in longest_first}
        changed = max(path.stat().st_mtime for path in [*HEADERS, command_file])
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            commands = [
                [*base, "-c", str(source), "-o", str(target)]
                for source, target in targets.items()
                if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, changed)
            ]
            list(pool.map(self.spawn, commands))
        return [str(target) for target in targets.values()]

    def announce_without_cuda(self) -> None:
        why = "NORMFUSE_CUDA=0" if os.environ.get("NORMFUSE_CUDA") == "0" else "no nvcc found"
        line = "=" * 78
        print(
            f"{line}\nnormfuse: building WITHOUT the CUDA kernels ({why}).\n{line}",
            file=sys.stderr,
            flush=True,
        )

    def write_facts(self, home: Path | None) -> None:
        version = output_of(home / "bin" / "nvcc", "--version") if home else None
        facts = {
            "torch": torch.__version__,
            "cuda": version.split("release ")[1].split(",")[0] if version else None,
            "architectures": architectures() if home else [],
            "compiler": output_of(os.environ.get("CXX", "c++"), "--version").splitlines()[0],
            "python_abi": f"abi3, built with CPython {platform.python_version()}",
            "interface": int(re.search(r"^INTERFACE = (\d+)$", PYTHON_SIDE.read_text(), re.MULTILINE)[1]),
        }
        folder = ROOT if self.inplace else Path(self.build_lib)
        (folder / "normfuse" / "_build_info.json").write_text(json.dumps(facts, indent=2) + "\n")


AUTOGRAD = CppExtension(
    "normfuse._autograd",
    ["csrc/autograd.cpp"],
    extra_compile_args={"cxx": ["-O2", "-g0", "-fvisibility=hidden"]},
    extra_link_args=["-s"],
)

setup(
    ext_modules=[
        CppExtension(
            "normfuse._C",
            relative(sources("", "bindings.cpp") + sources("cpu", "*.cpp")),
            depends=relative(HEADERS),
            py_limited_api=True,
            extra_compile_args={
                "cxx": [
                    *COMPILED_FOR,
                    "-fopenmp-simd",
                    "-fvisibility=hidden",
                    f"-DTORCH_TARGET_VERSION={TORCH_TARGET:#018x}",
                ]
            },
            # --no-as-needed keeps torch's CUDA library loaded although its only symbol here is weak
            extra_link_args=["-Wl,--no-as-needed", "-Wl,--exclude-libs,ALL", *LINKED_FOR],
        ),
        *([] if SANITIZED else [AUTOGRAD]),
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
