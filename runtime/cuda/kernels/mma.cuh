// c [16, 8] += a [16, 16] b [16, 8] on tensor cores: fp16 inputs, sums in fp32.
//
// Lane l has of a the rows l / 4 and l / 4 + 8 (a[0] and a[1]: columns l % 4 * 2 and the next one; a[2] and a[3]: the same 8
// columns further), of b the column l / 4 (b[0] and b[1]: rows as the columns of a), of c the same rows (c[0], c[1] and
// c[2], c[3]) and the columns l % 4 * 2 and the next one; PTX ISA, "Matrix Fragments for mma.m16n8k16".
//
// PTX runs on GPUs only: the tests' shim has its own function of this name.
#pragma once

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void mma(float* c, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing: eight columns of a at a time
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}
#endif
