/* What PyTorch's CPU kernels are slow at or don't have: the transforms of Winograd's F(4x4, 3x3) and the gradient of
   PReLU. float32, channels last in memory and a multiple of 16; faces/kernels.py compiles this file and says more. */

/* As wide as the processor's: narrower ones take twice as long, wider ones are compiled to code four times slower. */
#if defined __AVX512F__
enum { BYTES = 64 };
#elif defined __AVX__
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
typedef float vector __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int mask __attribute__((vector_size(BYTES)));
enum { LANES = BYTES / 4, MOST = 4096 };   /* floats in a vector; channels */
static const float zeros[MOST];            /* a pixel beyond the border */
#define AT(array, index) (*(vector *)((array) + (index)))
#define INLINE static inline __attribute__((always_inline))

INLINE vector prelu(vector x, vector slope) {
    const mask positive = x > 0;
    return (vector)(positive & (mask)x) + slope * (vector)(~positive & (mask)x);
}

/* B'd, A e and A'v of faces/winograd.py, by halves that are even and odd in its points 0, +-P, +-Q and infinity; there
   2 is 1 / P^2 = Q^2 and 2.5 is P^2 + Q^2. */
static const float P = 0.70710678f, Q = 1.41421356f;

INLINE void of_pixels(const vector d[6], vector v[6]) {
    const vector even_p = d[4] - 2 * d[2], odd_p = P * (d[3] - 2 * d[1]);
    const vector even_q = d[4] - 0.5f * d[2], odd_q = Q * (d[3] - 0.5f * d[1]);
    v[0] = d[0] - 2.5f * d[2] + d[4];
    v[1] = even_p + odd_p;
    v[2] = even_p - odd_p;
    v[3] = even_q + odd_q;
    v[4] = even_q - odd_q;
    v[5] = d[1] - 2.5f * d[3] + d[5];
}

INLINE void of_gradients(const vector e[4], vector v[6]) {
    const vector even_p = e[0] + 0.5f * e[2], odd_p = P * (e[1] + 0.5f * e[3]);
    const vector even_q = e[0] + 2 * e[2], odd_q = Q * (e[1] + 2 * e[3]);
    v[0] = e[0];
    v[1] = even_p + odd_p;
    v[2] = even_p - odd_p;
    v[3] = even_q + odd_q;
    v[4] = even_q - odd_q;
    v[5] = e[3];
}

INLINE void of_products(const vector v[6], vector y[4]) {
    const vector even_p = v[1] + v[2], odd_p = P * (v[1] - v[2]);
    const vector even_q = v[3] + v[4], odd_q = Q * (v[3] - v[4]);
    y[0] = v[0] + even_p + even_q;
    y[1] = odd_p + odd_q;
    y[2] = 0.5f * even_p + 2 * even_q;
    y[3] = 0.5f * odd_p + 2 * odd_q + v[5];
}

/* One tile t of x. Size, offset and transform are constants where this is called, so that its loops unroll; a loop over
   tiles in here would not let them be, as OpenMP makes it a function of its own before. */
INLINE void products(const float *x, float *v, long t, long tiles, long h, long w, long c, const int size,
                     const int offset, void transform(const vector *, vector *)) {
    const long down = (h + 3) / 4, across = (w + 3) / 4;
    const long image = t / (down * across), top = t / across % down * 4 + offset, left = t % across * 4 + offset;
    const float *pixels[6][6];
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            const int inside = 0 <= left + j && left + j < w && 0 <= top + i && top + i < h;
            pixels[j][i] = inside ? x + ((image * h + top + i) * w + left + j) * c : zeros;
        }
    for (long k = 0; k < c; k += LANES) {
        vector half[6][6];
        #pragma GCC unroll 6
        for (int j = 0; j < size; j++) {
            vector column[6], out[6];
            #pragma GCC unroll 6
            for (int i = 0; i < size; i++) column[i] = AT(pixels[j][i], k);
            transform(column, out);
            #pragma GCC unroll 6
            for (int a = 0; a < 6; a++) half[a][j] = out[a];
        }
        #pragma GCC unroll 6
        for (int a = 0; a < 6; a++) {
            vector out[6];
            transform(half[a], out);
            #pragma GCC unroll 6
            for (int b = 0; b < 6; b++) AT(v, ((a * 6 + b) * tiles + t) * c + k) = out[b];
        }
    }
}

/* v = B'xB of each tile of pixels, 6x6 from one above and left on. x (n, h, w, c), 0 beyond its border; v (6, 6, tiles,
   c). */
void pixels_to_products(const float *x, float *v, long n, long h, long w, long c, int threads) {
    const long tiles = n * ((h + 3) / 4) * ((w + 3) / 4);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) products(x, v, t, tiles, h, w, c, 6, -1, of_pixels);
}

/* v = A x A' of each tile of a gradient by the outputs, 4x4. */
void gradients_to_products(const float *x, float *v, long n, long h, long w, long c, int threads) {
    const long tiles = n * ((h + 3) / 4) * ((w + 3) / 4);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) products(x, v, t, tiles, h, w, c, 4, 0, of_gradients);
}

/* y = PReLU(bias + A'vA) of each tile. v (6, 6, tiles, c), bias and slope (c), y (n, h, w, c). */
void to_outputs(float *v, float *bias, float *slope, float *y, long n, long h, long w, long c, int threads) {
    const long down = (h + 3) / 4, across = (w + 3) / 4, tiles = n * down * across;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) {
        const long image = t / (down * across), top = t / across % down * 4, left = t % across * 4;
        for (long k = 0; k < c; k += LANES) {
            vector half[4][6];
            for (int b = 0; b < 6; b++) {
                vector column[6], out[4];
                #pragma GCC unroll 6
                for (int a = 0; a < 6; a++) column[a] = AT(v, ((a * 6 + b) * tiles + t) * c + k);
                of_products(column, out);
                #pragma GCC unroll 4
                for (int i = 0; i < 4; i++) half[i][b] = out[i];
            }
            for (int i = 0; i < 4 && top + i < h; i++) {
                vector out[4];
                of_products(half[i], out);
                #pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    if (left + j < w) {
                        const vector value = AT(bias, k) + out[j];
                        AT(y, ((image * h + top + i) * w + left + j) * c + k) = prelu(value, AT(slope, k));
                    }
            }
        }
    }
}

/* Gradients of y = x > 0 ? x : slope x. g, x, of_x (rows, c), slope (c), of_slope (parts, c), to be summed over the
   parts, whose number and not that of the threads decides how sums round. c is at most 4096. */
void prelu_gradients(float *g, float *x, float *slope, float *of_x, float *of_slope, long rows, long c, int parts,
                     int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < parts; part++) {
        vector sums[MOST / LANES] = {{0}};
        for (long r = rows * part / parts; r < rows * (part + 1) / parts; r++)
            for (long k = 0; k < c; k += LANES) {
                const vector gradient = AT(g, r * c + k), value = AT(x, r * c + k);
                const mask positive = value > 0;
                const vector below = (vector)(~positive & (mask)gradient);
                AT(of_x, r * c + k) = (vector)(positive & (mask)gradient) + AT(slope, k) * below;
                sums[k / LANES] += below * value;
            }
        for (long k = 0; k < c; k += LANES) AT(of_slope, part * c + k) = sums[k / LANES];
    }
}
