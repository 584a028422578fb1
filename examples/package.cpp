// Runs a package of lorafx.export in C++, with banks of adapters that save_banks wrote.
//
//     package MODEL.pt2 BANKS.pt INPUTS.pt OUTPUTS.pt
//
// docs/guides/export.md says how it is built. INPUTS.pt is a list of tensors, as torch.save writes
// it: the slot of each request (int32, -1 for the base), then the inputs in the order of
// Package.inputs. OUTPUTS.pt gets the list of the outputs, for torch.load.

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

static c10::IValue loaded(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes);
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: package MODEL.pt2 BANKS.pt INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  try {
    torch::inductor::AOTIModelPackageLoader model(argv[1]);

    // An exchange of adapters: the banks are constants of the model, and nothing is compiled.
    std::unordered_map<std::string, at::Tensor> banks;
    for (const auto& item : loaded(argv[2]).toGenericDict()) {
      banks[item.key().toStringRef()] = item.value().toTensor();
    }
    model.load_constants(banks, /*use_inactive=*/false, /*check_full_update=*/false);

    std::vector<at::Tensor> inputs;
    const c10::IValue given = loaded(argv[3]);
    for (const c10::IValue& item : given.toListRef()) {
      inputs.push_back(item.toTensor());
    }
    const std::vector<at::Tensor> outputs = model.run(inputs);
    const std::vector<char> bytes = torch::jit::pickle_save(c10::IValue(outputs));
    std::ofstream(argv[4], std::ios::binary).write(bytes.data(), bytes.size());
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
