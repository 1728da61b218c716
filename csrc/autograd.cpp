// The autograd of a training step in C++: what the autograd functions in normfuse/ops do in Python, which takes as long
// as the kernels of a small tensor. Unlike the operations, which it calls through the dispatcher, it is bound to the
// torch it was built with; so it is a library of its own, without which everything works. Only the usual case comes here:
// channels last, nothing synchronised, nothing to take back, no torch.compile, no tensor subclass.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
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

// What differs between the norms: their two operations, and the state and options these take, as `Fields`. Fields stay
// in the graph; their tensors are the module's own, which the backward pass reads and updates as they are then. Where the
// gradient is exact, `differentiable` is the backward in operations that autograd sees through, for a backward pass that is
// differentiated in turn (create_graph=True); where it is an approximation, there is its `name`, for a refusal.

struct Unified {
  static constexpr const char* name = "Unified Norm";
  using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, bool, double, double>;

  static Result forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                        const Maybe& pad_mask, const Fields& fields) {
    static const auto run =
        operation<Three(const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, int64_t, bool, double, double, const Maybe&, const Maybe&)>(
            "normfuse::unified_norm_forward");
    const auto& [running_var, buffer_x2, iters, skip_counter, ema_gz, buffer_gz, warmup_iters, outlier_filtration, eps,
                 momentum] = fields;
    const Maybe s = residual ? Maybe(at::empty_like(x)) : std::nullopt;
    auto [y, stats, step] = run.call(x, pad_mask, *weight, *bias, running_var, buffer_x2, iters, skip_counter,
                                     warmup_iters, outlier_filtration, eps, momentum, residual, s);
    return {y, s.value_or(x), {*weight, stats, step}};
  }

  static Three backward(const Tensor& grad_y, const Maybe& grad_s, const variable_list& saved, const Fields& fields) {
    static const auto run =
        operation<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, int64_t, double, const Maybe&)>("normfuse::unified_norm_backward");
    const auto& [running_var, buffer_x2, iters, skip_counter, ema_gz, buffer_gz, warmup_iters, outlier_filtration, eps,
                 momentum] = fields;
    return run.call(grad_y, saved[0], saved[1], saved[2], saved[3], ema_gz, buffer_gz, warmup_iters, momentum, grad_s);
  }
};

struct Power {
  static constexpr const char* name = "Power Norm";
  using Fields = std::tuple<Tensor, Tensor, Tensor, int64_t, int64_t, double, double, double, double, bool>;

  static Result forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                        const Maybe& pad_mask, const Fields& fields) {
    static const auto run =
        operation<Three(const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        int64_t, int64_t, double, double, double, const Maybe&, const Maybe&)>(
            "normfuse::power_norm_forward");
    const auto& [running_phi, iters, ema_gz, warmup_iters, group_num, eps, group_eps, alpha_fwd, alpha_bkw, paper] =
        fields;
    const Maybe s = residual ? Maybe(at::empty_like(x)) : std::nullopt;
    auto [y, stats, row_scale] = run.call(x, pad_mask, *weight, *bias, running_phi, iters, warmup_iters, group_num, eps,
                                          group_eps, alpha_fwd, residual, s);
    return {y, s.value_or(x), {*weight, stats, row_scale}};
  }

  static Three backward(const Tensor& grad_y, const Maybe& grad_s, const variable_list& saved, const Fields& fields) {
    static const auto run =
        operation<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        int64_t, double, bool, const Maybe&)>("normfuse::power_norm_backward");
    const auto& [running_phi, iters, ema_gz, warmup_iters, group_num, eps, group_eps, alpha_fwd, alpha_bkw, paper] =
        fields;
    return run.call(grad_y, saved[0], saved[1], saved[2], saved[3], ema_gz, group_num, alpha_bkw, paper, grad_s);
  }
};

struct Row {
  using Fields = std::tuple<int64_t, double>;

  static Result forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual, const Maybe&,
                        const Fields& fields) {
    static const auto run = operation<Three(const Tensor&, const Maybe&, const Maybe&, const Maybe&, int64_t, double)>(
        "normfuse::row_norm_forward");
    const auto& [kind, eps] = fields;
    auto [y, s, stats] = run.call(x, residual, weight, bias, kind, eps);
    return {y, residual ? s : x, {weight.value_or(Tensor()), stats}};
  }

  static Three backward(const Tensor& grad_y, const Maybe& grad_s, const variable_list& saved, const Fields& fields) {
    static const auto run =
        operation<Three(const Tensor&, const Maybe&, const Tensor&, const Maybe&, const Tensor&, int64_t)>(
            "normfuse::row_norm_backward");
    return run.call(grad_y, grad_s, saved[0], gain(saved), saved[2], std::get<0>(fields));
  }

  static Three differentiable(const Tensor& grad_y, const Maybe& grad_s, const variable_list& saved,
                              const Fields& fields) {
    static const auto run = operation<Three(const Tensor&, const Maybe&, const Tensor&, const Maybe&, int64_t, double)>(
        "normfuse::row_norm_gradient");
    return run.call(grad_y, grad_s, saved[0], gain(saved), std::get<0>(fields), std::get<1>(fields));
  }

 private:
  static Maybe gain(const variable_list& saved) { return saved[1].defined() ? Maybe(saved[1]) : std::nullopt; }
};

// Fields are kept one by one, under "0", "1", ...: in this form torch finds them when it captures a backward pass
// (compiled autograd).
std::string key(size_t index) { return std::string(1, char('0' + index)); }

template <class Fields, size_t... I>
void keep(AutogradContext* ctx, const Fields& fields, std::index_sequence<I...>) {
  ((ctx->saved_data[key(I)] = std::get<I>(fields)), ...);
}

template <class Fields, size_t... I>
Fields kept(AutogradContext* ctx, std::index_sequence<I...>) {
  return {ctx->saved_data[key(I)].template to<std::tuple_element_t<I, Fields>>()...};
}

template <class Norm, class = void>
constexpr bool is_exact = false;
template <class Norm>
constexpr bool is_exact<Norm, std::void_t<decltype(&Norm::differentiable)>> = true;

// Says why, in the words of normfuse/ops/_derivatives.py, where somebody differentiates the gradients.
void refuse_second_derivative(const char* norm, variable_list& gradients) {
  std::string reason;
  {
    pybind11::gil_scoped_acquire python;
    reason =
        pybind11::cast<std::string>(pybind11::module_::import("normfuse.ops._derivatives").attr("why_not_again")(norm));
  }
  auto error = std::make_shared<torch::autograd::DelayedError>(reason, gradients.size());
  for (Tensor& gradient : gradients) gradient = gradient.detach().requires_grad_();
  gradients = (*error)(std::move(gradients));
}

// Tensors come contiguous, made so where autograd sees it: what is saved belongs to the graph of a second derivative.
template <class Norm>
struct Step : Function<Step<Norm>> {
  using Fields = typename Norm::Fields;
  using Indices = std::make_index_sequence<std::tuple_size_v<Fields>>;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight, const Maybe& bias,
                               const Maybe& residual, const Maybe& pad_mask, const Fields& fields) {
    auto [y, s, saved] = Norm::forward(x, weight, bias, residual, pad_mask, fields);
    saved.insert(saved.begin(), s);
    ctx->save_for_backward(std::move(saved));
    keep(ctx, fields, Indices());
    ctx->saved_data["weight"] = weight.has_value();
    ctx->saved_data["bias"] = bias.has_value();
    ctx->set_materialize_grads(false);
    return residual ? variable_list{y, s} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);  // of x, weight, bias and residual; the mask and the fields have none
    const bool summed = grads.size() > 1, with_s = summed && grads[1].defined();
    if (!grads[0].defined()) {  // only s was used: nothing came through the norm
      if (with_s) result[0] = result[3] = grads[1];
      return result;
    }
    const Tensor grad_y = grads[0].contiguous();
    const Maybe grad_s = with_s ? Maybe(grads[1].contiguous()) : std::nullopt;
    const variable_list saved = ctx->get_saved_variables();
    const Fields fields = kept<Fields>(ctx, Indices());
    variable_list all(3);
    if (!at::GradMode::is_enabled()) {
      std::tie(all[0], all[1], all[2]) = Norm::backward(grad_y, grad_s, saved, fields);
    } else if constexpr (is_exact<Norm>) {
      std::tie(all[0], all[1], all[2]) = Norm::differentiable(grad_y, grad_s, saved, fields);
    } else {
      {
        at::AutoGradMode off(false);
        std::tie(all[0], all[1], all[2]) = Norm::backward(grad_y, grad_s, saved, fields);
      }
      refuse_second_derivative(Norm::name, all);
    }
    result[0] = all[0];
    if (ctx->saved_data["weight"].toBool()) result[1] = all[1];
    if (ctx->saved_data["bias"].toBool()) result[2] = all[2];
    if (summed) result[3] = all[0];
    return result;
  }
};

// Dynamic Tanh and Dynamic erf, which learn two numbers more and know no residual.
struct DynamicActivation : Function<DynamicActivation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& alpha, const Maybe& shift,
                        const Tensor& weight, const Tensor& bias, int64_t curve) {
    static const auto run =
        operation<Tensor(const Tensor&, const Tensor&, const Maybe&, const Tensor&, const Tensor&, int64_t)>(
            "normfuse::dynamic_activation_forward");
    ctx->save_for_backward({x, alpha, shift.value_or(Tensor()), weight});
    ctx->saved_data["curve"] = curve;
    return run.call(x, alpha, shift, weight, bias, curve);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                         const Maybe&, const Tensor&, int64_t);
    const auto run = [](auto&&... given) {
      if (at::GradMode::is_enabled()) {
        static const auto differentiable = operation<Signature>("normfuse::dynamic_activation_gradient");
        return differentiable.call(given...);
      }
      static const auto kernel = operation<Signature>("normfuse::dynamic_activation_backward");
      return kernel.call(given...);
    };
    variable_list all(5);  // of x, alpha, shift, weight and bias
    const auto saved = ctx->get_saved_variables();
    const Maybe shift = saved[2].defined() ? Maybe(saved[2]) : std::nullopt;
    std::tie(all[0], all[1], all[2], all[3], all[4]) =
        run(grads[0].contiguous(), saved[0], saved[1], shift, saved[3], ctx->saved_data["curve"].toInt());
    if (!shift) all[2] = Tensor();
    all.emplace_back();  // of the curve
    return all;
  }

  static Tensor step(const Tensor& x, const Tensor& alpha, const Maybe& shift, const Tensor& weight, const Tensor& bias,
                     int64_t curve) {
    return apply(x.contiguous(), alpha, shift, weight, bias, curve);
  }
};

template <class Norm, class Fields>
struct Call;
template <class Norm, class... T>
struct Call<Norm, std::tuple<T...>> {
  static variable_list step(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                            const Maybe& pad_mask, T... fields) {
    return Step<Norm>::apply(x.contiguous(), weight, bias, residual ? Maybe(residual->contiguous()) : residual,
                             pad_mask ? Maybe(pad_mask->reshape(-1)) : pad_mask,
                             std::tuple<T...>(std::move(fields)...));
  }
};
template <class Norm>
constexpr auto step = &Call<Norm, typename Norm::Fields>::step;

}  // namespace
}  // namespace normfuse

// Arguments by position, fields last. They return [y], or [y, s] with a residual.
PYBIND11_MODULE(_autograd, m) {
  m.def("unified_norm", normfuse::step<normfuse::Unified>);
  m.def("power_norm", normfuse::step<normfuse::Power>);
  m.def("row_norm", normfuse::step<normfuse::Row>);
  m.def("dynamic_activation", &normfuse::DynamicActivation::step);  // returns y
}
