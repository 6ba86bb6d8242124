// SPDX-License-Identifier: BSD-3-Clause
// What NEON has in hardware of vec_portable.inl.h. Included before it.

ML_FN Lanes<float, 16> multiply_add(Lanes<float, 16> a, Lanes<float, 16> b, Lanes<float, 16> c) {
  return vfmaq_f32(c, a, b);
}
ML_FN Lanes<double, 16> multiply_add(Lanes<double, 16> a, Lanes<double, 16> b,
                                     Lanes<double, 16> c) {
  return vfmaq_f64(c, a, b);
}
ML_FN Lanes<float, 16> widened_float16(Lanes<uint16_t, 8> half) {
  return vcvt_f32_f16(vreinterpret_f16_u16(half));
}
ML_FN Lanes<uint16_t, 8> narrowed_float16(Lanes<float, 16> x) {
  return vreinterpret_u16_f16(vcvt_f16_f32(x));
}
