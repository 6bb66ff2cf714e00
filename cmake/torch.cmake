# Headers and libraries of the installed torch, found without importing it (XCOS_TORCH_DIR: its package folder).
if(NOT XCOS_TORCH_DIR)
  find_package(Python COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else '', end='')"
    OUTPUT_VARIABLE XCOS_TORCH_DIR)
endif()
if(NOT EXISTS "${XCOS_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "xcos_ext needs torch 2.10 or later at build time; XCOS_TORCH_DIR is '${XCOS_TORCH_DIR}'. "
                      "Install it first: pip install torch==2.13.0")
endif()
file(STRINGS "${XCOS_TORCH_DIR}/version.py" version_line REGEX "^__version__")
string(REGEX REPLACE ".*'([^']+)'.*" "\\1" XCOS_TORCH_VERSION "${version_line}")
set(XCOS_TORCH_INCLUDES "${XCOS_TORCH_DIR}/include")
set(XCOS_TORCH_LIBRARIES "${XCOS_TORCH_DIR}/lib/libtorch.so" "${XCOS_TORCH_DIR}/lib/libtorch_cpu.so")
