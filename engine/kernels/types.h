// What crosses the C interface; `engine/kernels/native.py` declares the same structures.

struct Matrix {  // N outputs x K inputs, in panels of 32 outputs; see quantized.h
    const uint8_t* panels;
    const float* bias;  // [N padded to 32], or null
    int64_t n, k;
    int64_t bits;  // 4 or 8
};

struct Span {             // where one sequence's rows of a step are, and its blocks
    int64_t first_row;
    int64_t num_rows;
    int64_t start;        // the position of the first row
    int64_t first_block;  // in `blocks`
};

struct Attention {
    void* keys;    // [N, Hkv, block, D]
    void* values;  // [N, Hkv, block, Dv]
    const Span* spans;
    const int64_t* blocks;
    int64_t num_spans, heads, kv_heads, dim, value_dim, block_size;
    int64_t window;  // 0: none
    float scale;
};

struct AttendArgs {
    Attention attention;
    const void* q;  // [T, Hq, D], rows `q_stride` elements apart
    const void* k;  // [T, Hkv, D], this step's keys
    const void* v;  // [T, Hkv, Dv]
    void* out;      // [T, Hq, Dv]
    int64_t q_stride, k_stride, v_stride;
};

struct Layer {
    const float* attention_norm;  // [H]
    const float* mlp_norm;        // [H]
    const float* query_norm;      // [D], or null
    const float* key_norm;
    Matrix qkv;      // H -> (Hq + 2 Hkv) D; rotated pairs are neighbours
    Matrix out;      // Hq D -> H
    Matrix gate_up;  // H -> 2 I
    Matrix down;     // I -> H
    void* keys;
    void* values;
    int64_t window;
};

struct Decoder {
    const Layer* layers;
    const float* norm;          // [H]
    const float* inv_freq;      // [D / 2]
    const uint16_t* embedding;  // [V, H] bfloat16, or null: the head's rows
    Matrix head;                // H -> V
    int64_t num_layers, hidden, inner, heads, kv_heads, dim, block_size;
    int64_t cache_bytes;        // of an element: 4 float32, 2 bfloat16
    float eps, scale, rope_scale;
};

struct CacheTensor {  // [blocks, heads, block_size, D]: keys or values of a layer
    uint8_t* data;
    int64_t heads, block_size;
    int64_t token_bytes;  // of one head's D elements
};

struct BlockCopy {
    int64_t source, target, num_tokens;
};

struct Rows {  // of logits, `stride` elements apart
    const float* logits;
    const int64_t* index;  // which of them, [count]; null: all
    int64_t count, vocab, stride;

    const float* at(int64_t row) const { return logits + (index ? index[row] : row) * stride; }
};

struct Choice {  // of a token for each row, where no more is asked for than is here
    Rows rows;
    const int64_t *lanes, *positions;  // [R]
    // Of each lane, [L].
    const bool *greedy, *common;  // common: sampled, with the following and no other filters
    const int64_t* seeds;
    const float* temperature;
    const float* min_p;    // its logarithm; -inf: none
    const int64_t* top_k;  // 0: none
    const float* top_p;    // the mass above the last token that stays; 1: none
    // Results, [R].
    float* top;    // the largest entry, NaN if there is one
    int64_t* ids;  // the token, or for `late` rows the largest entry's
    bool* late;    // somebody else has to choose
};

struct Counts {  // of each lane's tokens, [L, ...]; see engine/logits/counts.py
    const int32_t* tokens;          // [L, C]
    const int64_t* prompt_lengths;  // [L]
    const int64_t* windows;         // [L]: so many of the latest count; below 0: all
    int32_t* slots;                 // [L, V]: 1 more than where a token stands; 0: nowhere
    int32_t *ids, *seen, *generated;  // [L, C]
    int64_t* sizes;                   // [L]: how many tokens stand there
    int64_t context, vocab;           // C, V
};

struct Penalties {  // of each lane, [L]
    const float *repetition, *frequency, *presence;
    const bool* prompt;  // whether the first also looks at the prompt
};

struct Matches {  // of each lane; see engine/logits/matches.py
    const int32_t* tokens;  // [L, C]
    int32_t* lengths;       // [L, C]: of the match that ends there
    int64_t context;        // C
};

struct Dry {  // of each lane, [L, ...]; see engine/logits/dry.py
    const int32_t* tokens;   // [L, C]
    const int32_t* matches;  // [L, C]: how long a match ends there
    int32_t* longest;        // [L, V]: a place to work in
    const bool* breakers;    // [L, V]: which tokens are sequence breakers
    const float *multiplier, *base;     // [L]
    const int64_t *allowed, *last_n;    // [L]
    int64_t context, vocab;             // C, V
};

struct Candidates {     // of rows, K each: what stays of them, see engine/logits/candidates.py
    const float* logits;  // [R, K], best first, -inf where dropped
    const bool *unsure, *tail, *whole;  // [R]
    const bool* active;                 // [R]: the rows in which anything may be dropped
    int64_t rows, k;
    float* kept;  // [R, K], the result
    bool* flags;  // [3, R], the result: unsure, tail, whole
};

// Put the k smallest of n keys in order, in one of two buffers of n; returns which. Keys that agree
// in their upper halves must come in order.
const uint64_t* sort_keys(uint64_t* keys, uint64_t* other, int64_t n, int64_t k);

struct Step {
    const Decoder* decoder;
    const int64_t* token_ids;  // [T]
    const int64_t* positions;  // [T]
    const Span* spans;
    const int64_t* blocks;
    int64_t num_tokens, num_spans;
    float* hidden;     // [T, H], the result
    uint8_t* scratch;  // as many bytes as `scratch_bytes` says
    // What goes into each layer and out of the last, and each layer's queries, of n of the tokens.
    const int64_t* probed;  // [T]: which of the n a token is, or -1; null: none is wanted
    int64_t num_probed;
    float* states;   // [layers + 1, n, H]
    float* queries;  // [layers, n, Hq D]
    // Inputs that take the place of embeddings.
    const int64_t* replaced;  // [T]: which of `inputs` a token has, or -1; null: none
    const float* inputs;      // [m, H]
    // The tokens whose hidden states somebody reads; null: all. The others end with the last layer's
    // keys and values, and what `hidden` holds for them means nothing.
    const int64_t* read;
    int64_t num_read;
};
