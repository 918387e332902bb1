// Decode with a folder of `ltepass export`, without Python: generate FOLDER N id id ... prints the ids that follow.
//
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O1 generate.cpp -o generate -I$T/include -I$T/include/torch/csrc/api/include \
//       -L$T/lib -Wl,-rpath,$T/lib -ltorch -ltorch_cpu -lc10
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/import_read.h>
#include <torch/torch.h>

#include <iostream>
#include <sstream>

using torch::inductor::AOTIModelPackageLoader;
using Weights = std::unordered_map<std::string, at::Tensor>;

Weights read_weights(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  auto all = torch::jit::readArchiveAndTensors("data", "", "", std::nullopt, std::nullopt, std::nullopt, reader);
  Weights weights;
  for (const auto& entry : all.toGenericDict()) weights.emplace(entry.key().toStringRef(), entry.value().toTensor());
  return weights;
}

void give(AOTIModelPackageLoader& graph, const Weights& weights) {
  Weights its_own;
  for (const auto& name : graph.get_constant_fqns()) its_own.emplace(name, weights.at(name));
  graph.load_constants(its_own, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
}

// The numbers that the metadata has under a name, as "30 2 1".
std::vector<int64_t> numbers(AOTIModelPackageLoader& graph, const std::string& name) {
  std::istringstream words(graph.get_metadata().at(name));
  return {std::istream_iterator<int64_t>(words), {}};
}

int main(int argc, char** argv) {
  if (argc < 4) return std::cerr << "usage: generate FOLDER N id id ...\n", 2;
  const std::string folder = argv[1];
  if (!dlopen((folder + "/ops.so").c_str(), RTLD_NOW | RTLD_GLOBAL)) return std::cerr << dlerror() << "\n", 1;
  const c10::InferenceMode no_gradients;
  const Weights weights = read_weights(folder + "/weights.pt");  // the graphs read them where they lie
  AOTIModelPackageLoader decode(folder + "/decode.pt2"), prefill(folder + "/prefill.pt2");
  give(decode, weights), give(prefill, weights);
  const auto shape = numbers(decode, "cache"), eos = numbers(decode, "eos");
  const auto dtype = static_cast<at::ScalarType>(numbers(decode, "cache_dtype").at(0));
  const at::Tensor cache = torch::empty(shape, dtype);
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; i++) ids.push_back(std::atoll(argv[i]));
  int64_t position = 0;
  for (int64_t left = std::atoll(argv[2]); left > 0 && int64_t(ids.size()) < shape[4]; left--) {
    const at::Tensor fresh = torch::tensor(std::vector<int64_t>(ids.begin() + position, ids.end())).unsqueeze(0);
    auto& graph = fresh.size(1) == 1 ? decode : prefill;
    const at::Tensor logits = graph.run({fresh, torch::tensor(position), cache})[0];
    position = int64_t(ids.size());
    ids.push_back(logits.argmax(-1).item<int64_t>());
    std::cout << ids.back() << " " << std::flush;
    if (std::find(eos.begin(), eos.end(), ids.back()) != eos.end()) break;
  }
  std::cout << "\n";
}
