// The autograd of a training step in C++: what the autograd functions in normfuse/ops do in Python, which takes as long
// as the kernels of a small tensor. Unlike the operations, which it calls through the dispatcher, it is bound to the
// torch it was built with; so it is a library of its own, without which everything works. Only the usual case comes here:
// channels last, nothing synchronised, nothing to take back, no torch.compile, no tensor subclass.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <utility>

namespace normfuse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Torch checks the signature against the schema that the operation was declared with.
template <class Signature>
c10::TypedOperatorHandle<Signature> operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Of a forward pass: its result, what was normalised (x, or x + residual), and what else the backward pass needs.
struct Result {
  Tensor y, s;
  variable_list saved;
};

// What differs between the norms: the two operations, with their state and options. A copy stays in the graph; its
// tensors are the module's own, which the backward pass reads and updates as they are then.

struct Unified {
  Tensor running_var, buffer_x2, iters, skip_counter, ema_gz, buffer_gz;
  int64_t warmup_iters;
  bool outlier_filtration;
  double eps, momentum;

  Result forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                 const Maybe& pad_mask) const {
    static const auto run =
        operation<Three(const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, int64_t, bool, double, double, const Maybe&, const Maybe&)>(
            "normfuse::unified_norm_forward");
    const Maybe s = residual ? Maybe(at::empty_like(x)) : std::nullopt;
    auto [y, stats, step] = run.call(x, pad_mask, *weight, *bias, running_var, buffer_x2, iters, skip_counter,
                                     warmup_iters, outlier_filtration, eps, momentum, residual, s);
    return {y, s.value_or(x), {*weight, stats, step}};
  }
  Three backward(const Tensor& grad_y, const Maybe& grad_s, const variable_list& saved) const {
    static const auto run =
        operation<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, int64_t, double, const Maybe&)>("normfuse::unified_norm_backward");
    return run.call(grad_y, saved[0], saved[1], saved[2], saved[3], ema_gz, buffer_gz, warmup_iters, momentum, grad_s);
  }
};

struct Power {
  Tensor running_phi, iters, ema_gz;
  int64_t warmup_iters, group_num;
  double eps, alpha_fwd, alpha_bkw;
  bool paper;

  Result forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                 const Maybe& pad_mask) const {
    static const auto run =
        operation<Three(const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        int64_t, int64_t, double, double, const Maybe&, const Maybe&)>("normfuse::power_norm_forward");
    const Maybe s = residual ? Maybe(at::empty_like(x)) : std::nullopt;
    auto [y, stats, row_scale] =
        run.call(x, pad_mask, *weight, *bias, running_phi, iters, warmup_iters, group_num, eps, alpha_fwd, residual, s);
    return {y, s.value_or(x), {*weight, stats, row_scale}};
  }
  Three backward(const Tensor& grad_y, const Maybe& grad_s, const variable_list& saved) const {
    static const auto run =
        operation<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        int64_t, double, bool, const Maybe&)>("normfuse::power_norm_backward");
    return run.call(grad_y, saved[0], saved[1], saved[2], saved[3], ema_gz, group_num, alpha_bkw, paper, grad_s);
  }
};

struct Row {
  int64_t kind;
  double eps;

  static Tensor rows(const Tensor& x) { return x.view({-1, x.size(-1)}); }
  static Maybe rows(const Maybe& x) { return x ? Maybe(rows(*x)) : x; }

  Result forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual, const Maybe&) const {
    static const auto run = operation<Three(const Tensor&, const Maybe&, const Maybe&, const Maybe&, int64_t, double)>(
        "normfuse::row_norm_forward");
    auto [y, s, stats] = run.call(rows(x), rows(residual), weight, bias, kind, eps);
    return {y.view(x.sizes()), residual ? s.view(x.sizes()) : x, {weight.value_or(Tensor()), stats}};
  }
  Three backward(const Tensor& grad_y, const Maybe& grad_s, const variable_list& saved) const {
    static const auto run =
        operation<Three(const Tensor&, const Maybe&, const Tensor&, const Maybe&, const Tensor&, int64_t)>(
            "normfuse::row_norm_backward");
    const Maybe weight = saved[1].defined() ? Maybe(saved[1]) : std::nullopt;
    auto [grad_x, grad_weight, grad_bias] =
        run.call(rows(grad_y), rows(grad_s), rows(saved[0]), weight, saved[2], kind);
    return {grad_x.view(grad_y.sizes()), grad_weight, grad_bias};
  }
};

template <class Norm>
struct Held : torch::CustomClassHolder {
  Held(const Norm& norm, bool weight, bool bias) : norm(norm), weight(weight), bias(bias) {}
  const Norm norm;
  const bool weight, bias;  // whether there are any
};

template <class Norm>
struct Step : Function<Step<Norm>> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight, const Maybe& bias,
                               const Maybe& residual, const Maybe& pad_mask, const Norm& norm) {
    auto [y, s, saved] =
        norm.forward(x.contiguous(), weight, bias, residual ? Maybe(residual->contiguous()) : std::nullopt, pad_mask);
    saved.insert(saved.begin(), s);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["norm"] =
        c10::IValue::make_capsule(c10::make_intrusive<Held<Norm>>(norm, weight.has_value(), bias.has_value()));
    ctx->set_materialize_grads(false);
    return residual ? variable_list{y, s} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);  // of x, weight, bias and residual; the mask and the norm have none
    const bool summed = grads.size() > 1, with_s = summed && grads[1].defined();
    if (!grads[0].defined()) {  // only s was used: nothing came through the norm
      if (with_s) result[0] = result[3] = grads[1];
      return result;
    }
    const auto capsule = ctx->saved_data["norm"].toCapsule();
    const auto& held = static_cast<const Held<Norm>&>(*capsule);
    const bool differentiable = at::GradMode::is_enabled();
    Three gradients;
    {
      at::AutoGradMode off(false);
      gradients = held.norm.backward(grads[0].contiguous(), with_s ? Maybe(grads[1].contiguous()) : std::nullopt,
                                     ctx->get_saved_variables());
    }
    variable_list all{std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
    if (differentiable) refuse_second_derivative(all);
    result[0] = all[0];
    if (held.weight) result[1] = all[1];
    if (held.bias) result[2] = all[2];
    if (summed) result[3] = all[0];
    return result;
  }

 private:
  // The gradients are formulas of their own: differentiating them is refused, as @once_differentiable does.
  static void refuse_second_derivative(variable_list& gradients) {
    auto error = std::make_shared<torch::autograd::DelayedError>(
        "trying to differentiate twice a function that was marked with @once_differentiable", gradients.size());
    for (Tensor& gradient : gradients) gradient = gradient.detach().requires_grad_();
    gradients = (*error)(std::move(gradients));
  }
};

template <class Norm, class... Fields>
variable_list step(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                   const Maybe& pad_mask, Fields... fields) {
  return Step<Norm>::apply(x, weight, bias, residual, pad_mask ? Maybe(pad_mask->reshape(-1)) : pad_mask,
                           Norm{std::move(fields)...});
}

}  // namespace
}  // namespace normfuse

// Arguments by position, in the order of the fields. They return [y], or [y, s] with a residual.
PYBIND11_MODULE(_autograd, m) {
  using namespace normfuse;
  m.def("unified_norm", &step<Unified, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, bool, double, double>);
  m.def("power_norm", &step<Power, Tensor, Tensor, Tensor, int64_t, int64_t, double, double, double, bool>);
  m.def("row_norm", &step<Row, int64_t, double>);
}
