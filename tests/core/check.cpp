// The CPU core without Python: every whole-tensor function of kernels.h against naive.h, on every
// tier this CPU has, on 1, 2 and 3 threads, with every buffer against a guard page (guard.h).
// Builds wherever there is a C++17 compiler and POSIX; `make portability` runs it on other CPUs.
//
//   core_check [TIER [start]]    fails if the core has not chosen TIER by itself
//
// With `start`, buffers lie flush at their start only: QEMU 7.2 reads 16 bytes for the memory
// operand of a scalar FMA, so that there right code faults at a buffer's end.
//
// Inputs are read-only while the core runs; an output holds a pattern before. The three thread
// counts and the two placements must give the same bits.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <iterator>
#include <list>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "guard.h"
#include "naive.h"

namespace {

namespace cpu = sparsekern::cpu;
using guard::Flush;
using naive::Bytes;
using sparsekern::Activation;
using sparsekern::DType;

constexpr DType kFormats[] = {DType::f32, DType::f16, DType::bf16,
                              DType::f64, DType::i8,  DType::u8};
constexpr DType kProducts[] = {DType::f32, DType::f16, DType::bf16};
constexpr int kThreads[] = {1, 2, 3};

// ---- running one case everywhere ----

// One buffer of a case. With `check` it is an output of the size of `bytes`, and check returns what
// is wrong with it; without, it is an input.
struct Part {
  const char* name;
  Bytes bytes;
  std::function<std::string(const uint8_t*)> check = nullptr;
};
using Pointers = std::vector<uint8_t*>;
using Call = std::function<std::string(const Pointers&, int threads)>;

long passed = 0, failed = 0;
std::vector<Flush> placements = {Flush::end, Flush::start};

void verdict(const std::string& wrong) {
  if (wrong.empty()) {
    ++passed;
  } else if (++failed <= 20) {
    std::printf("FAILED %s\n  %s\n", guard::running().text, wrong.c_str());
  }
}

// The outputs of one run, and in `wrong` what is wrong with them.
Bytes run_once(const std::vector<Part>& parts, const Call& call, int threads, Flush flush,
               std::string& wrong) {
  std::list<guard::Buffer> buffers;
  Pointers at;
  for (const Part& part : parts) {
    guard::Buffer& buffer = buffers.emplace_back(part.name, part.bytes.size(), flush);
    std::copy(part.bytes.begin(), part.bytes.end(), buffer.data());
    if (!part.check) buffer.forbid_writes();
    at.push_back(buffer.data());
  }
  guard::running().buffers = &buffers;
  guard::running().scratch_flush = flush;
  wrong = call(at, threads);
  Bytes outputs;
  auto buffer = buffers.begin();
  for (const Part& part : parts) {
    if (wrong.empty() && !buffer->margin_is_intact()) {
      wrong = std::string("something was written outside `") + part.name + "`";
    }
    if (part.check) {
      if (wrong.empty()) wrong = part.check(buffer->data());
      outputs.insert(outputs.end(), buffer->data(), buffer->data() + buffer->size());
    }
    ++buffer;
  }
  if (wrong.empty() && !guard::scratch_is_intact()) wrong = "something was written outside scratch";
  guard::running().buffers = nullptr;
  return outputs;
}

void run(const std::string& name, const std::vector<Part>& parts, const Call& call) {
  for (const std::string& isa : cpu::isas()) {
    cpu::set_isa(isa);
    Bytes first;
    for (const int threads : kThreads) {
      for (const Flush flush : placements) {
        std::snprintf(guard::running().text, sizeof guard::running().text,
                      "%s, %s, %d threads, buffers flush at their %s", name.c_str(), isa.c_str(),
                      threads, flush == Flush::end ? "end" : "start");
        std::string wrong;
        Bytes outputs = run_once(parts, call, threads, flush, wrong);
        if (first.empty()) first = outputs;
        if (wrong.empty() && outputs != first) wrong = "other bits than on one thread";
        verdict(wrong);
      }
    }
  }
}

// ---- parts ----

Bytes pattern(size_t size) { return Bytes(size, 0x5C); }

template <class T>
Bytes bytes_of(const std::vector<T>& from) {
  Bytes bytes(from.size() * sizeof(T));
  if (!from.empty()) std::memcpy(bytes.data(), from.data(), bytes.size());
  return bytes;
}

Part output(const char* name, Bytes want) {
  Bytes before = pattern(want.size());
  return {name, std::move(before), [want = std::move(want)](const uint8_t* got) -> std::string {
            for (size_t i = 0; i < want.size(); ++i) {
              if (got[i] == want[i]) continue;
              return "byte " + std::to_string(i) + " of " + std::to_string(want.size()) + " is " +
                     std::to_string(got[i]) + ", not " + std::to_string(want[i]);
            }
            return {};
          }};
}

// An output for which any bytes are right.
Part scribble(const char* name, size_t size) {
  return {name, pattern(size), [](const uint8_t*) { return std::string(); }};
}

Part output_near(const char* name, DType dtype, std::vector<double> want,
                 std::vector<double> tolerance) {
  Bytes before = pattern(want.size() * static_cast<size_t>(naive::format_of(dtype).bytes));
  return {name, std::move(before),
          [dtype, want = std::move(want),
           tolerance = std::move(tolerance)](const uint8_t* bytes) -> std::string {
            const int size = naive::format_of(dtype).bytes;
            for (size_t i = 0; i < want.size(); ++i) {
              const double got =
                  naive::to_double(naive::get_bits(bytes, static_cast<int64_t>(i), size), dtype);
              if (got == want[i] || std::fabs(got - want[i]) <= tolerance[i]) continue;
              char text[120];
              std::snprintf(text, sizeof text, "y[%zu] is %.9g, not %.9g within %.3g", i, got,
                            want[i], tolerance[i]);
              return text;
            }
            return {};
          }};
}

// ---- numbers ----

class Random {
 public:
  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint64_t>(n)); }

  // Any bits at all: NaN payloads, infinities, denormals, and zeros of both signs.
  Bytes any(int64_t n, int bytes, int zeros_in_ten = 2) {
    Bytes out(static_cast<size_t>(n * bytes));
    for (int64_t i = 0; i < n; ++i) {
      const int kind = below(10);
      if (kind >= zeros_in_ten) {
        naive::put_bits(out, i, bytes, kind == 9 ? uint64_t{1} << (8 * bytes - 1) : bits());
      }
    }
    return out;
  }
  // -2 .. 2, of which sums are exact and many tie; or a fraction of any size in between.
  Bytes numbers(int64_t n, DType dtype, bool integers = true) {
    const int bytes = naive::format_of(dtype).bytes, low = dtype == DType::u8 ? 0 : -2;
    Bytes out(static_cast<size_t>(n * bytes));
    for (int64_t i = 0; i < n; ++i) {
      const double v = integers ? low + below(3 - low) : std::ldexp(below(1 << 20), -18) - 2;
      naive::put_bits(out, i, bytes, naive::from_double(v, dtype));
    }
    return out;
  }
  Bytes legal_meta(int64_t bytes) {
    constexpr int kNibbles[] = {4, 8, 9, 12, 13, 14};
    Bytes out(static_cast<size_t>(bytes));
    for (uint8_t& b : out) b = static_cast<uint8_t>(kNibbles[below(6)] | kNibbles[below(6)] << 4);
    return out;
  }

 private:
  uint64_t state_ = 1;
};
Random draw;

// ---- the 2:4 formats ----

struct Matrix {
  int64_t rows, K;
};
constexpr Matrix kMatrices[] = {{0, 8},    {3, 0},    {1, 4},    {1, 12},  {4, 8},
                                {5, 36},   {8, 64},   {3, 60},   {8, 100}, {5, 192},
                                {7, 1028}, {64, 516}, {300, 260}};

void formats() {
  for (const Matrix& matrix : kMatrices) {
    const int64_t rows = matrix.rows, K = matrix.K;
    for (const DType dtype : kFormats) {
      const naive::Format f = naive::format_of(dtype);
      const std::string what = std::string("_24 ") + f.name + " rows=" + std::to_string(rows) +
                               " K=" + std::to_string(K);
      const auto op = [=](auto function) {
        return [=](const Pointers& p, int threads) {
          function(p, rows, K, dtype, threads);
          return std::string();
        };
      };
      for (const bool any : {true, false}) {
        const Bytes w = any ? draw.any(rows * K, f.bytes) : draw.numbers(rows * K, dtype);
        const naive::Packed packed = naive::pack(w, rows, K, dtype);
        run("prune" + what, {{"weight", w}, output("out", packed.dense)},
            op([](auto& p, auto... a) { cpu::prune_24(p[0], p[1], a...); }));
        run("pack" + what,
            {{"weight", w}, output("values", packed.values), output("meta", packed.meta)},
            op([](auto& p, auto... a) { cpu::pack_24(p[0], p[1], p[2], a...); }));
        run("unpack" + what,
            {{"values", packed.values}, {"meta", packed.meta}, output("dense", packed.dense)},
            op([](auto& p, auto... a) { cpu::unpack_24(p[0], p[1], p[2], a...); }));
        if (!any && rows % 4 == 0) {
          run("prune" + what + " transposable",
              {{"weight", w}, output("out", naive::prune_transposable(w, rows, K, dtype))},
              op([](auto& p, auto... a) { cpu::prune_24_transposable(p[0], p[1], a...); }));
        }
        // Gathering what another weight keeps: any legal meta.
        const Bytes meta = draw.legal_meta(rows * ((K + 7) / 8));
        Bytes gathered(w.size() / 2);
        for (int64_t slot = 0; slot < rows * K / 2; ++slot) {
          const int64_t row = slot / (K / 2), in_row = slot % (K / 2);
          const uint64_t at = naive::get_bits(meta.data(), row * ((K + 7) / 8) + in_row / 4, 1);
          const int64_t i =
              row * K + in_row / 2 * 4 + static_cast<int64_t>(at >> in_row % 4 * 2 & 3);
          naive::put_bits(gathered, slot, f.bytes, naive::get_bits(w.data(), i, f.bytes));
        }
        run("gather" + what, {{"dense", w}, {"meta", meta}, output("values", gathered)},
            op([](auto& p, auto... a) { cpu::gather_24(p[0], p[1], p[2], a...); }));
      }
      // An illegal meta has no meaning, but even then nothing outside is touched.
      const Bytes w = draw.any(rows * K, f.bytes), meta = draw.any(rows * ((K + 7) / 8), 1, 0);
      run("unpack" + what + " illegal meta",
          {{"values", Bytes(w.begin(), w.begin() + w.size() / 2)},
           {"meta", meta},
           scribble("dense", w.size())},
          op([](auto& p, auto... a) { cpu::unpack_24(p[0], p[1], p[2], a...); }));
      run("gather" + what + " illegal meta",
          {{"dense", w}, {"meta", meta}, scribble("values", w.size() / 2)},
          op([](auto& p, auto... a) { cpu::gather_24(p[0], p[1], p[2], a...); }));
    }
  }
}

// ---- the 2:4 product ----

struct Shape {
  int64_t M, N, K;
};
// One to a few rows, panels and passes with remainders; K below, at and past a vector and a chunk.
constexpr Shape kShapes[] = {
    {0, 5, 8},     {3, 0, 8},     {1, 1, 4},     {1, 50, 1028}, {2, 47, 36},   {3, 97, 132},
    {4, 48, 64},   {5, 49, 68},   {6, 31, 100},  {11, 33, 260}, {12, 65, 28},  {16, 96, 128},
    {17, 17, 516}, {31, 16, 20},  {33, 131, 96}, {40, 50, 188}, {64, 40, 192}, {65, 13, 44},
    {130, 49, 92}, {513, 19, 52}, {3, 513, 12},  {1, 1030, 72}, {9, 7, 4100},  {128, 64, 32}};
// What only the tiles of AMX divide further; too large for emulators.
constexpr Shape kTileShapes[] = {
    {35, 530, 1060}, {80, 1050, 1060}, {300, 300, 132}, {1030, 40, 68}};
std::vector<Shape> shapes() {
  std::vector<Shape> all(std::begin(kShapes), std::end(kShapes));
  const auto isas = cpu::isas();
  if (std::find(isas.begin(), isas.end(), "amx") != isas.end()) {
    all.insert(all.end(), std::begin(kTileShapes), std::end(kTileShapes));
  }
  return all;
}
const std::pair<const char*, Activation> kActivations[] = {{"none", Activation::none},
                                                           {"relu", Activation::relu},
                                                           {"relu2", Activation::relu2},
                                                           {"gelu", Activation::gelu},
                                                           {"silu", Activation::silu}};
struct Strides {
  const char* name;
  int64_t m, k;
};
constexpr int kLayouts = 6;
Strides strides_of(int layout, int64_t M, int64_t K) {
  const Strides all[kLayouts] = {{"contiguous", K, 1},   {"sliced rows", K + 3, 1},
                                 {"column-major", 1, M}, {"every other column", 2 * K, 2},
                                 {"expanded row", 0, 1}, {"expanded column", 1, 0}};
  return all[layout];
}

void product(const Shape& s, DType dtype, int layout, int activation, bool with_bias,
             bool integers) {
  const int64_t M = s.M, N = s.N, K = s.K;
  const naive::Format f = naive::format_of(dtype);
  const Strides stride = strides_of(layout, M, K);
  const Activation act = kActivations[activation].second;
  const int64_t last = M * K == 0 ? -1 : (M - 1) * stride.m + (K - 1) * stride.k;
  const Bytes x = draw.numbers(last + 1, dtype, integers);
  const naive::Packed weight = naive::pack(draw.numbers(N * K, dtype, integers), N, K, dtype);
  const Bytes bias = draw.numbers(with_bias ? N : 0, dtype, integers);
  const naive::Product want = naive::linear(naive::to_doubles(x, dtype), stride.m, stride.k,
                                            naive::to_doubles(weight.dense, dtype),
                                            naive::to_doubles(bias, dtype), M, N, K);
  std::vector<double> y, tolerance;
  for (size_t i = 0; i < want.exact.size(); ++i) {
    const double z = want.exact[i];
    y.push_back(naive::activate(z, act));
    if (integers && activation < 3) {  // exact in fp32: only the last rounding is left
      y.back() = naive::to_double(naive::from_double(y.back(), dtype), dtype);
      tolerance.push_back(0);
      continue;
    }
    // What fp32 sums in any order may be off by, through the activation, and half a unit of y.
    const double off = (static_cast<double>(K) / 2 + 8) * 0x1p-24 * want.size[i];
    const double slope = act == Activation::relu2 ? 2 * std::fabs(z) + off : 1.2;
    tolerance.push_back(slope * off + 0x1p-20 * std::fabs(y.back()) + 0x1p-30 +
                        std::ldexp(std::fabs(y.back()), -f.mantissa - 1) + 0x1p-25);
  }
  const std::string name = std::string("linear_24 ") + f.name + " M=" + std::to_string(M) +
                           " N=" + std::to_string(N) + " K=" + std::to_string(K) + " " +
                           stride.name + " " + kActivations[activation].first +
                           (with_bias ? " bias" : "") + (integers ? " integers" : "");
  run(name,
      {{"x", x},
       {"values", weight.values},
       {"meta", weight.meta},
       {"bias", bias},
       output_near("y", dtype, y, tolerance)},
      [&](const Pointers& p, int threads) {
        cpu::linear_24({p[0], stride.m, stride.k, p[1], p[2], nullptr, with_bias ? p[3] : nullptr,
                        p[4], M, N, K, dtype, act},
                       threads);
        return std::string();
      });
  if (layout != 0) return;
  // A prepacked weight: the same bytes from every tier, the exact inverse, and the same product.
  Bytes packed(weight.values.size() + weight.meta.size());
  cpu::prepack_24(weight.values.data(), weight.meta.data(), packed.data(), N, K, dtype, 1);
  run("prepack_24, " + name,
      {{"values", weight.values}, {"meta", weight.meta}, output("packed", packed)},
      [&](const Pointers& p, int threads) {
        cpu::prepack_24(p[0], p[1], p[2], N, K, dtype, threads);
        return std::string();
      });
  run("unprepack_24, " + name,
      {{"packed", packed}, output("values", weight.values), output("meta", weight.meta)},
      [&](const Pointers& p, int threads) {
        cpu::unprepack_24(p[0], p[1], p[2], N, K, dtype, threads);
        return std::string();
      });
  run("prepacked " + name,
      {{"x", x}, {"packed", packed}, {"bias", bias}, output_near("y", dtype, y, tolerance)},
      [&](const Pointers& p, int threads) {
        cpu::linear_24({p[0], stride.m, stride.k, nullptr, nullptr, p[1],
                        with_bias ? p[2] : nullptr, p[3], M, N, K, dtype, act},
                       threads);
        return std::string();
      });
}

void products() {
  int turn = 0;
  for (const DType dtype : kProducts) {
    for (const Shape& shape : shapes()) {
      product(shape, dtype, 0, 0, false, true);
      product(shape, dtype, turn % kLayouts, turn % 5, turn % 3 > 0, false);
      ++turn;
    }
    for (int layout = 0; layout < kLayouts; ++layout) {
      for (int activation = 0; activation < 5; ++activation) {
        for (const Shape& shape : {Shape{3, 17, 36}, Shape{37, 18, 68}}) {
          product(shape, dtype, layout, activation, (layout + activation) % 2, activation < 3);
        }
      }
    }
    // Any bits as meta: no meaning, but nothing outside is touched.
    for (const Shape& s : {Shape{2, 19, 68}, Shape{40, 19, 68}}) {
      const int64_t M = s.M, N = s.N, K = s.K;
      const int bytes = naive::format_of(dtype).bytes;
      run(std::string("linear_24 ") + naive::format_of(dtype).name + " illegal meta",
          {{"x", draw.any(M * K, bytes)},
           {"values", draw.any(N * K / 2, bytes)},
           {"meta", draw.any(N * ((K + 7) / 8), 1, 0)},
           scribble("y", static_cast<size_t>(M * N * bytes))},
          [&](const Pointers& p, int threads) {
            cpu::linear_24(
                {p[0], K, 1, p[1], p[2], nullptr, nullptr, p[3], M, N, K, dtype, Activation::none},
                threads);
            return std::string();
          });
    }
  }
}

// ---- its gradients ----

// Numbers as `dtype` holds them, from sums that are exact in fp32 when `integers`.
void expect(const std::vector<double>& exact, const std::vector<double>& size, int64_t terms,
            DType dtype, bool integers, std::vector<double>* want, std::vector<double>* off) {
  for (size_t i = 0; i < exact.size(); ++i) {
    const double v = exact[i];
    want->push_back(integers ? naive::to_double(naive::from_double(v, dtype), dtype) : v);
    off->push_back(integers ? 0
                            : (static_cast<double>(terms) + 8) * 0x1p-24 * size[i] +
                                  std::ldexp(std::fabs(v), -naive::format_of(dtype).mantissa - 1) +
                                  0x1p-25);
  }
}

void gradients(const Shape& s, DType dtype, int layout, bool integers) {
  const int64_t M = s.M, N = s.N, K = s.K;
  const Strides of_dy = strides_of(layout, M, N), of_x = strides_of((layout + 1) % kLayouts, M, K);
  const auto elements = [&](const Strides& st, int64_t columns) {
    return M * columns == 0 ? 0 : (M - 1) * st.m + (columns - 1) * st.k + 1;
  };
  const Bytes dy = draw.numbers(elements(of_dy, N), dtype, integers);
  const Bytes x = draw.numbers(elements(of_x, K), dtype, integers);
  const naive::Packed weight = naive::pack(draw.numbers(N * K, dtype, integers), N, K, dtype);
  const std::vector<double> dense = naive::to_doubles(weight.dense, dtype);
  const std::vector<double> wide_dy = naive::to_doubles(dy, dtype);
  const std::vector<double> wide_x = naive::to_doubles(x, dtype);
  const auto turned = [](int64_t rows, int64_t columns, auto at) {
    std::vector<double> out;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) out.push_back(at(r, c));
    }
    return out;
  };
  const auto dense_at = [&](int64_t n, int64_t k) { return dense[static_cast<size_t>(n * K + k)]; };
  const auto x_at = [&](int64_t m, int64_t k) {
    return wide_x[static_cast<size_t>(m * of_x.m + k * of_x.k)];
  };
  const std::string name = std::string(naive::format_of(dtype).name) + " M=" + std::to_string(M) +
                           " N=" + std::to_string(N) + " K=" + std::to_string(K) + " dy " +
                           of_dy.name + (integers ? " integers" : "");

  std::vector<double> want, off;
  const naive::Product dx =
      naive::linear(wide_dy, of_dy.m, of_dy.k, turned(N, K, dense_at), {}, M, K, N);
  expect(dx.exact, dx.size, N, dtype, integers, &want, &off);
  run("linear_24_dx " + name,
      {{"dy", dy},
       {"values", weight.values},
       {"meta", weight.meta},
       output_near("dx", dtype, want, off)},
      [&](const Pointers& p, int threads) {
        cpu::linear_24_dx({{p[0], of_dy.m, of_dy.k}, p[1], p[2], p[3], M, N, K, dtype}, threads);
        return std::string();
      });

  const naive::Product all =
      naive::linear(wide_dy, of_dy.k, of_dy.m, turned(M, K, x_at), {}, N, K, M);
  std::vector<double> exact, size;
  for (int64_t slot = 0; slot < N * K / 2; ++slot) {
    const int64_t n = slot / (K / 2), j = slot % (K / 2);
    const uint64_t at = naive::get_bits(weight.meta.data(), n * ((K + 7) / 8) + j / 4, 1);
    const auto i =
        static_cast<size_t>(n * K + j / 2 * 4 + static_cast<int64_t>(at >> j % 4 * 2 & 3));
    exact.push_back(all.exact[i]);
    size.push_back(all.size[i]);
  }
  want.clear();
  off.clear();
  expect(exact, size, M, dtype, integers, &want, &off);
  run("linear_24_dvalues " + name,
      {{"dy", dy}, {"x", x}, {"meta", weight.meta}, output_near("dvalues", dtype, want, off)},
      [&](const Pointers& p, int threads) {
        cpu::linear_24_dvalues(
            {{p[0], of_dy.m, of_dy.k}, {p[1], of_x.m, of_x.k}, p[2], p[3], M, N, K, dtype},
            threads);
        return std::string();
      });
}

// ---- zero-value compression ----

constexpr int64_t kLengths[] = {0,  1,  7,   8,    9,    15,   16,   31,   32,    33,   63,
                                64, 65, 100, 1000, 4095, 4096, 4097, 8191, 12295, 70001};

// The pointers in the order of the parts below.
int64_t compress(const Pointers& p, int64_t n, int bytes, int64_t room, int threads) {
  return cpu::zvc_compress(p[0], n, bytes, p[1], p[2], room, reinterpret_cast<int64_t*>(p[3]),
                           threads);
}
std::string expand(const Pointers& p, int64_t count, int64_t n, int bytes, int threads) {
  const auto* offsets = reinterpret_cast<const int64_t*>(p[2]);
  return cpu::zvc_expand(p[0], p[1], count, offsets, n, bytes, p[3], threads);
}

void zvc(int64_t n, int bytes, int zeros_in_ten) {
  const Bytes x = draw.any(n, bytes, zeros_in_ten);
  const naive::Stream s = naive::compress(x, n, bytes);
  const int64_t count = static_cast<int64_t>(s.values.size()) / bytes;
  const std::string what = " n=" + std::to_string(n) + " of " + std::to_string(bytes) +
                           " bytes, zeros " + std::to_string(zeros_in_ten) + " in 10";
  for (const int64_t room : {count, count / 2, int64_t{0}}) {
    run("zvc compress" + what + " room " + std::to_string(room),
        {{"x", x},
         output("mask", s.mask),
         output("values", Bytes(s.values.begin(), s.values.begin() + room * bytes)),
         output("offsets", bytes_of(s.offsets))},
        [&](const Pointers& p, int threads) -> std::string {
          const int64_t found = compress(p, n, bytes, room, threads);
          return found == count ? "" : "it counts " + std::to_string(found);
        });
  }
  // Tiles as they are, and last tile first: any order is legal.
  std::vector<int64_t> reversed;
  Bytes values;
  for (size_t t = s.offsets.size(); t-- > 0;) {
    const int64_t begin = s.offsets[t], end = t + 1 < s.offsets.size() ? s.offsets[t + 1] : count;
    reversed.insert(reversed.begin(), static_cast<int64_t>(values.size()) / bytes);
    values.insert(values.end(), s.values.begin() + begin * bytes, s.values.begin() + end * bytes);
  }
  for (const auto& stream : {std::pair{s.offsets, s.values}, {reversed, values}}) {
    run("zvc expand" + what,
        {{"mask", s.mask},
         {"values", stream.second},
         {"offsets", bytes_of(stream.first)},
         output("x", x)},
        [&](const Pointers& p, int threads) { return expand(p, count, n, bytes, threads); });
  }
  if (count == 0) return;
  // Lies are found out, and nothing outside is read before.
  std::vector<int64_t> far = s.offsets, before = s.offsets, anywhere = s.offsets;
  far.back() = int64_t{1} << 62;
  before.front() = -1;
  for (int64_t& offset : anywhere) offset = static_cast<int64_t>(draw.bits());
  for (const auto& lie : {std::pair{far, s.mask},
                          {before, s.mask},
                          {anywhere, s.mask},
                          {s.offsets, Bytes(s.mask.size(), 0xff)}}) {
    if (lie.first == s.offsets && lie.second == s.mask) continue;  // every bit was set: the truth
    run("zvc expand of a lie" + what,
        {{"mask", lie.second},
         {"values", s.values},
         {"offsets", bytes_of(lie.first)},
         scribble("x", x.size())},
        [&](const Pointers& p, int threads) -> std::string {
          return expand(p, count, n, bytes, threads).empty() ? "the lie is believed" : "";
        });
  }
}

}  // namespace

int main(int argc, char** argv) {
  guard::catch_faults();
  const std::string chosen = cpu::isa();
  std::printf("tier %s of", chosen.c_str());
  for (const std::string& isa : cpu::isas()) std::printf(" %s", isa.c_str());
  std::printf(", %s\n", cpu::has_openmp() ? "OpenMP" : "no OpenMP");
  std::fflush(stdout);
  if (argc > 1 && chosen != argv[1]) {
    std::printf("the core chose %s, not %s\n", chosen.c_str(), argv[1]);
    return 1;
  }
  if (argc > 2 && argv[2] == std::string("start")) placements = {Flush::start};
  const auto section = [](const char* name, auto body) {
    const long before = passed;
    body();
    std::printf("%-24s %ld passed\n", name, passed - before);
    std::fflush(stdout);
  };
  section("2:4 formats", formats);
  section("2:4 product", products);
  section("its gradients", [] {
    int turn = 0;
    for (const DType dtype : kProducts) {
      for (const Shape& shape : shapes())
        gradients(shape, dtype, turn % kLayouts, turn % 2), ++turn;
    }
  });
  section("zero-value compression", [] {
    for (const int64_t n : kLengths) {
      for (const int bytes : {1, 2, 4, 8}) {
        for (const int zeros : {0, 5, 10}) zvc(n, bytes, zeros);
      }
    }
  });
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed > 0;
}
