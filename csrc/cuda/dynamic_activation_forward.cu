// Dynamic Tanh and Dynamic erf, forward: y = w f(alpha x + shift) + b; curve_math.h has f. Reads x and writes y.
#include "columns.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <Curve kCurve, class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dynamic_activation_apply(DynamicActivationForward a) {
  using Acc = AccOf<T>;
  const Place<T, V> place(a.shape.rows, a.shape.channels);
  const Acc alpha = number<Acc>(a.alpha), shift = number<Acc>(a.shift);
  Acc weight[V] = {}, bias[V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    weight[i] = static_cast<const Acc*>(a.weight)[place.column + i];
    bias[i] = static_cast<const Acc*>(a.bias)[place.column + i];
  }
  place.walk({static_cast<const T*>(a.x)}, [&](int64_t row, const Pack<T, V>(&in)[1]) {
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i)
      narrow(weight[i] * curve_value<kCurve>(alpha * widen(in[0].v[i]) + shift) + bias[i], &out.v[i]);
    place.store(static_cast<T*>(a.y), row, out);
  });
}

template <Curve kCurve, class T, int V>
int launch(const DynamicActivationForward& a, [[maybe_unused]] void* stream) {
  const ColumnGrid columns(a.shape, V);
  NF_LAUNCH((dynamic_activation_apply<kCurve, T, V>), columns.grid(), columns.block(), stream, a);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const DynamicActivationForward& args, void*, void* stream) {
  return with_curve(args.curve, [&](auto curve) {
    return cuda::with_packs(args.shape.dtype, args.shape.channels, {args.x, args.y},
                            [&](auto t, auto pack) { return cuda::launch<curve, decltype(t), pack>(args, stream); });
  });
}

}  // namespace normfuse
