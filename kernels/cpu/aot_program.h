// Running a recorded program from code that AOTInductor wrote. It is compiled there, not here: the
// tables are those of program.py, and the kernels' addresses come in a tensor, whose first number is
// that of the threads.

struct FastgenWord {  // constant + factor * scalars[scalar] + addresses[address]
  int64_t constant, factor, scalar, address;
};

struct FastgenSize {  // constant + factor * scalars[scalar]
  int64_t constant, factor, scalar;
};

struct FastgenExternal {  // a tensor that is given, as it was recorded
  int32_t dtype;
  int64_t dim;
  FastgenSize sizes[8], strides[8];
};

struct FastgenProgram {
  int64_t num_calls;
  const int64_t* calls;  // for each the number of its kernel and of its first word
  int64_t num_words;
  const FastgenWord* words;
  int64_t num_scalars;  // scalar 0 is the number of threads
  const int64_t* sources;  // for each of the others a tensor and one of its dimensions
  int64_t num_externals;
  const FastgenExternal* externals;
  FastgenSize workspace;
  int64_t num_results;
  const FastgenSize* results;  // how many elements each has
  const int32_t* dtypes;
};

static inline int64_t fastgen_number(const FastgenSize& size, const int64_t* scalars) {
  return size.constant + size.factor * scalars[size.scalar];
}

// Whether a tensor lies as it was recorded; the stride of a single element may be any number.
static bool fastgen_fits(AtenTensorHandle tensor, const FastgenExternal& as, const int64_t* scalars) {
  int32_t dtype;
  int64_t dim, *sizes, *strides;
  if (aoti_torch_get_dtype(tensor, &dtype) || aoti_torch_get_dim(tensor, &dim) ||
      aoti_torch_get_sizes(tensor, &sizes) || aoti_torch_get_strides(tensor, &strides))
    return false;
  if (dtype != as.dtype || dim != as.dim) return false;
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] != fastgen_number(as.sizes[i], scalars)) return false;
    if (sizes[i] > 1 && strides[i] != fastgen_number(as.strides[i], scalars)) return false;
  }
  return true;
}

static AOTITorchError fastgen_run(const FastgenProgram& program, AtenTensorHandle kernels,
                                  const AtenTensorHandle* tensors, AtenTensorHandle* const* results) {
  static thread_local std::vector<int64_t> scalars, addresses, words;
  static thread_local std::vector<char> workspace;
  void* data;
  if (aoti_torch_get_data_ptr(kernels, &data)) return AOTI_TORCH_FAILURE;
  const int64_t* functions = static_cast<const int64_t*>(data);
  scalars.assign(1, functions[0]);
  for (int64_t i = 1; i < program.num_scalars; ++i) {
    int64_t* sizes;
    if (aoti_torch_get_sizes(tensors[program.sources[2 * i - 2]], &sizes)) return AOTI_TORCH_FAILURE;
    scalars.push_back(sizes[program.sources[2 * i - 1]]);
  }
  const size_t needed = fastgen_number(program.workspace, scalars.data()) + 64;
  if (workspace.size() < needed) std::vector<char>(needed).swap(workspace);
  addresses.assign(1, 0);
  addresses.push_back((reinterpret_cast<int64_t>(workspace.data()) + 63) & ~int64_t(63));
  for (int64_t i = 0; i < program.num_externals; ++i) {
    if (!fastgen_fits(tensors[i], program.externals[i], scalars.data()) ||
        aoti_torch_get_data_ptr(tensors[i], &data))
      return AOTI_TORCH_FAILURE;
    addresses.push_back(reinterpret_cast<int64_t>(data));
  }
  for (int64_t i = 0; i < program.num_results; ++i) {
    const int64_t size = fastgen_number(program.results[i], scalars.data()), stride = 1;
    if (aoti_torch_empty_strided(1, &size, &stride, program.dtypes[i], aoti_torch_device_type_cpu(),
                                 0, results[i]) ||
        aoti_torch_get_data_ptr(*results[i], &data))
      return AOTI_TORCH_FAILURE;
    addresses.push_back(reinterpret_cast<int64_t>(data));
  }
  words.resize(program.num_words);
  for (int64_t i = 0; i < program.num_words; ++i) {
    const FastgenWord& word = program.words[i];
    words[i] = word.constant + word.factor * scalars[word.scalar] + addresses[word.address];
  }
  for (int64_t i = 0; i < program.num_calls; ++i) {
    const auto kernel =
        reinterpret_cast<int64_t (*)(const int64_t*)>(functions[1 + program.calls[2 * i]]);
    if (kernel(words.data() + program.calls[2 * i + 1])) return AOTI_TORCH_FAILURE;
  }
  return AOTI_TORCH_SUCCESS;
}
