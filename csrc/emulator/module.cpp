// Python's way to the emulated kernels: normfuse_emulator.<operation>(arrays..., options...), with the
// arguments, results and in-place states of the torch operations of the same names. x is a float32, float64
// or float16 array, or a uint16 array that holds bfloat16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../operations.h"
#include "simt.h"

namespace py = pybind11;
using namespace normfuse;

namespace {

struct Numpy {
  using Tensor = py::array;
  struct Type {
    char kind;
    int64_t bytes;
    bool operator==(const Type& other) const { return kind == other.kind && bytes == other.bytes; }
  };

  static Type int64() { return {'i', 8}; }
  static Type boolean() { return {'b', 1}; }
  static Type type(const Tensor& t) { return {t.dtype().kind(), t.itemsize()}; }
  static int64_t dim(const Tensor& t) { return t.ndim(); }
  static int64_t size(const Tensor& t, int64_t axis) { return t.shape(axis); }
  static int64_t numel(const Tensor& t) { return t.size(); }
  static bool contiguous(const Tensor& t) { return t.flags() & py::array::c_style; }
  static void* data(const Tensor& t) { return const_cast<Tensor&>(t).mutable_data(); }

  static std::string name_of(Type type) { return dtype(type).attr("name").cast<std::string>(); }
  static int64_t bytes_of(Type type) { return type.bytes; }
  static std::optional<DType> dtype_of(Type type) {
    if (type == Type{'u', 2}) return DType::kBFloat16;
    if (type == Type{'f', 2}) return DType::kFloat16;
    if (type == Type{'f', 4}) return DType::kFloat32;
    if (type == Type{'f', 8}) return DType::kFloat64;
    return std::nullopt;
  }
  static Type acc_of(Type type) { return {'f', type.bytes == 8 ? 8 : 4}; }

  static bool same_device(const Tensor&, const Tensor&) { return true; }
  static bool readable(const Tensor&) { return false; }  // as on a device
  static void check_memory(const char*, const Tensor&) {}
  static Tensor empty(const Tensor&, std::initializer_list<int64_t> sizes, Type type) {
    return Tensor(dtype(type), std::vector<py::ssize_t>(sizes.begin(), sizes.end()));
  }
  static Tensor empty_like(const Tensor& x) {
    return Tensor(x.dtype(), std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  }

  template <class Args, class... Shape>
  static void run(const Args& args, const Tensor&, const Shape&... shape) {
    std::vector<char> workspace(cuda_workspace_bytes(shape...), char(0xff));
    py::gil_scoped_release nothing_of_python_below;
    if (run_cuda(args, workspace.data(), nullptr) != cudaSuccess) throw std::runtime_error("the launch failed");
  }

 private:
  static py::dtype dtype(Type type) { return py::dtype(std::string(1, type.kind) + std::to_string(type.bytes)); }
};

void configure(const std::string& order, unsigned seed, unsigned workers, int multiprocessors) {
  simt::Options o;
  if (order == "reverse")
    o.order = simt::Order::kReverse;
  else if (order == "random")
    o.order = simt::Order::kRandom;
  else if (order != "forward")
    throw py::value_error("order must be forward, reverse or random");
  o.seed = seed;
  o.workers = workers;
  o.multiprocessors = multiprocessors;
  simt::options() = o;
}

}  // namespace

PYBIND11_MODULE(normfuse_emulator, m) {
#define NORMFUSE_ENTRY(name, function) m.def(name, &Operations<Numpy>::function)
  NORMFUSE_OPERATIONS(NORMFUSE_ENTRY);
  m.def("configure", &configure, py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 1u,
        py::arg("workers") = 1u, py::arg("multiprocessors") = 4);
}
