/* Stand-ins for TensorRT's libraries, with just enough in them for its Python bindings to be imported and
 * looked at: the entry points that the bindings link to, none of which can make anything. One of INFER,
 * PARSER and PLUGIN picks the library; MAJOR is its version. */

#define ENTRY __attribute__((visibility("default")))

#if defined(INFER)

ENTRY void* createInferBuilder_INTERNAL(void* logger, int version) {
  (void)logger, (void)version;
  return 0;
}
ENTRY void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) {
  (void)engine, (void)logger, (void)version;
  return 0;
}
ENTRY void* createInferRuntime_INTERNAL(void* logger, int version) {
  (void)logger, (void)version;
  return 0;
}
ENTRY void* getPluginRegistry(void) { return 0; }
ENTRY void* getBuilderPluginRegistry(int capability) {
  (void)capability;
  return 0;
}

#elif defined(PARSER)

ENTRY void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) {
  (void)network, (void)logger, (void)version;
  return 0;
}
ENTRY void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) {
  (void)refitter, (void)logger, (void)version;
  return 0;
}
ENTRY int getNvOnnxParserVersion(void) { return MAJOR * 10000; }

#elif defined(PLUGIN)

ENTRY _Bool initLibNvInferPlugins(void* logger, const char* name_space) {
  (void)logger, (void)name_space;
  return 0;
}

#else
#error "define INFER, PARSER or PLUGIN"
#endif
