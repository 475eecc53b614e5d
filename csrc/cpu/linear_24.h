// linear_24 on one thread: y[m, n] = activation(sum_k x[m, k] * weight[n, k] + bias[n]).
//
// Three shapes of one idea: bring the x that a kept weight names next to that weight, then one fused
// multiply-add. By the number of rows of x:
//
//   rows      lanes along one row of the weight, as it is stored           linear_24_rows.h
//   tiles     lanes along sixteen rows of the weight, from a block of it   linear_24_tiles.h
//   panels    lanes along the rows of x, from a block of the weight        linear_24_panels.h
//
// Blocks (prepack_24.h) come prepacked, or are made in the call where enough rows of x pay for it.
//
// A tier T supplies a vector of floats F and of integers I, loads, stores, fma, `transpose`, and the
// permutes of its own that the three ask for; linear_24_ISA.cpp puts them together.
#pragma once

#include "linear_24_panels.h"
#include "linear_24_rows.h"
#include "linear_24_tiles.h"

namespace sparsekern::cpu {
namespace {

template <class T, DType D, template <class, DType> class Row, template <class, DType> class Tile>
constexpr Linear24Kernels linear_24_kernels(int64_t max_rows, int64_t max_tiles,
                                            int64_t max_tiles_packed) {
  using Rows = LinearRows<T, D, Row>;
  using Tiles = LinearTiles<T, D, Tile>;
  using Panels = LinearPanels<T, D>;
  return {sizeof(typename Rows::X),
          Rows::pack,
          Rows::run,
          T::kTileRows,
          Tiles::kSpan,
          Tiles::pack,
          Tiles::run,
          T::kLanes,
          Panels::pack,
          Panels::run,
          Blocks<T, D>::prepack,
          max_rows,
          max_tiles,
          max_tiles_packed};
}

}  // namespace
}  // namespace sparsekern::cpu
