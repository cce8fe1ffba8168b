// The bucket functions of image RPE, as irpe.bucket_ids has them; tests compare the two.
"use strict";

const f32 = Math.fround;

// Halves go to the even neighbour, as in torch.
function roundEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

// alpha, beta, gamma of a ratio (Wu et al., Eq. 18).
function coefficients(ratio) {
  return { alpha: ratio, beta: 2 * ratio, gamma: 8 * ratio };
}

// The largest index that has a row in the tables.
function bound(ratio) {
  return Math.trunc(coefficients(ratio).beta);
}

// Piecewise or clipped index of an integer offset; in float32, as the released tables were trained.
function stepIndex(offset, ratio, clip = false) {
  const { alpha, beta, gamma } = coefficients(ratio);
  const far = Math.abs(offset), most = bound(ratio);
  if (clip) return Math.sign(offset) * Math.min(far, most);
  let index = far;
  if (far > alpha) {
    const log = f32(Math.log(f32(far / f32(alpha))));
    const scaled = f32(f32(log / f32(Math.log(gamma / alpha))) * f32(beta - alpha));
    index = Math.min(f32(beta), roundEven(f32(f32(alpha) + scaled)));
  }
  return Math.sign(offset) * Math.min(most, Math.trunc(index)) || 0;
}

function isSumOfSquares(n) {
  for (let a = 0; a * a <= n; a++) {
    const b = Math.round(Math.sqrt(n - a * a));
    if (a * a + b * b === n) return true;
  }
  return false;
}

const ranks = [0];

// How many smaller squared distances integer offsets can have.
function rankOf(squared) {
  for (let n = ranks.length; n <= squared; n++) {
    ranks.push(ranks[n - 1] + (isSumOfSquares(n) ? 1 : 0));
  }
  return ranks[squared];
}

// Bucket of an offset query - key: one number, for method cross a pair (rows, columns).
function bucketOf(method, ratio, rows, columns, clip = false) {
  const most = bound(ratio), index = (x) => stepIndex(x, ratio, clip);
  const squared = rows * rows + columns * columns;
  switch (method) {
    case "product":
      return [(index(rows) + most) * (2 * most + 1) + index(columns) + most];
    case "cross":
      return [index(rows) + most, index(columns) + most];
    case "euc":
      return [index(Math.round(Math.sqrt(squared))) + most];
    case "quant":
      return [index(squared) + most];
    case "rank":
      return [index(rankOf(squared)) + most];
  }
  throw new Error(`unknown method ${method}`);
}

// Buckets of all patches as keys, row by row, for the query at (row, column).
function bucketMap(method, ratio, height, width, row, column, clip = false) {
  const map = [];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) map.push(bucketOf(method, ratio, row - y, column - x, clip));
  }
  return map;
}

// Rows of the tables, the one of prefix tokens left out.
function tableSize(method, ratio) {
  const side = 2 * bound(ratio) + 1;
  return method === "product" ? side * side : method === "cross" ? 2 * side : side;
}

if (typeof module !== "undefined") module.exports = { bucketMap, bucketOf, stepIndex, tableSize };
