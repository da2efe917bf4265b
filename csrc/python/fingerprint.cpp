// The Python module threshnet_fast._fingerprint, which answers one question in microseconds: is a
// model still what it was? Who has made something from a model records what it was made from, fact
// by fact, and asks before each use whether all facts still hold.
//
// Written for Python's limited API: one library serves every Python and every torch. A fact about a
// tensor reads the at::Tensor within the Python object, wherever this torch has it: its place is
// looked for, and what is read there is compared with what Python says, before it is relied on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

extern "C" {
// Of torch's stable C interface. A handle is the address of an at::Tensor.
int32_t aoti_torch_get_data_ptr(void* handle, void** data);
int32_t aoti_torch_get_dim(void* handle, int64_t* dimensions);
int32_t aoti_torch_get_sizes(void* handle, int64_t** sizes);
int32_t aoti_torch_get_strides(void* handle, int64_t** strides);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                           void (*body)(int64_t begin, int64_t end, void* context), void* context);

// at::TensorBase::_version() const, for which the stable interface has no function; null in a torch
// without it.
#if defined(__linux__)
int64_t tensor_version(const void* handle) __asm__("_ZNK2at10TensorBase8_versionEv")
    __attribute__((weak));
#else
constexpr int64_t (*tensor_version)(const void*) = nullptr;
#endif
}

namespace {

// What a dictionary has under a key.
struct Entry {
  PyObject* dictionary;
  PyObject* key;
  PyObject* value;      // null: nothing
  Py_ssize_t position;  // where PyDict_Next finds it while no key comes or goes
};

// All values of a dictionary, in order.
struct Values {
  PyObject* dictionary;
  std::vector<PyObject*> values;
};

// What an attribute of an object equals.
struct Attribute {
  PyObject* object;
  PyObject* name;
  PyObject* value;
};

struct Kind {
  PyObject* object;
  PyTypeObject* type;
};

constexpr int64_t kMostDimensions = 4;

// Where a tensor lies, in what shape, and how often torch has written there.
struct Place {
  void* handle;
  void* implementation;
  void* data;
  int64_t version;  // kAny: does not matter
  int64_t dimensions;
  int64_t sizes[kMostDimensions], strides[kMostDimensions];
};

constexpr int64_t kAny = -1;

// What torch says of a tensor; false where it says nothing.
struct Layout {
  void* data;
  int64_t dimensions;
  int64_t *sizes, *strides;

  bool read(void* handle) {
    return aoti_torch_get_data_ptr(handle, &data) == 0 &&
           aoti_torch_get_dim(handle, &dimensions) == 0 &&
           aoti_torch_get_sizes(handle, &sizes) == 0 &&
           aoti_torch_get_strides(handle, &strides) == 0;
  }
};

// Four bytes in the memory of a tensor.
struct Sample {
  const void* address;
  uint32_t bits;
};

struct Recorded {
  std::vector<PyObject*> references;  // to all objects that the facts are about
  std::vector<Entry> entries;
  std::vector<Attribute> attributes;
  std::vector<Kind> kinds;
  std::vector<Values> values;
  std::vector<Place> places;
  std::vector<Sample> samples;

  void keep(PyObject* object) {
    references.push_back(object);
    Py_INCREF(object);
  }
};

struct Facts {
  PyObject_HEAD Recorded* recorded;
};

Recorded& recorded_of(PyObject* self) { return *reinterpret_cast<Facts*>(self)->recorded; }

uint32_t bits_at(const void* address) {
  uint32_t bits;
  std::memcpy(&bits, address, sizeof bits);
  return bits;
}

bool holds(const Entry& entry) {
  Py_ssize_t position = entry.position;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  if (entry.value != nullptr && PyDict_Next(entry.dictionary, &position, &key, &value) != 0 &&
      key == entry.key && value == entry.value)
    return true;
  // Keys may have moved.
  return PyDict_GetItemWithError(entry.dictionary, entry.key) == entry.value;
}

bool holds(const Attribute& attribute) {
  PyObject* const value = PyObject_GetAttr(attribute.object, attribute.name);
  if (value == nullptr) return false;
  const int same = PyObject_RichCompareBool(value, attribute.value, Py_EQ);
  Py_DECREF(value);
  return same == 1;
}

bool holds(const Kind& kind) { return Py_TYPE(kind.object) == kind.type; }

bool holds(const Values& values) {
  if (PyDict_Size(values.dictionary) != static_cast<Py_ssize_t>(values.values.size())) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (PyObject* const expected : values.values) {
    if (PyDict_Next(values.dictionary, &position, &key, &value) == 0 || value != expected)
      return false;
  }
  return true;
}

bool holds(const Place& place) {
  Layout found;
  if (*static_cast<void**>(place.handle) != place.implementation || !found.read(place.handle) ||
      found.data != place.data || found.dimensions != place.dimensions)
    return false;
  for (int64_t i = 0; i < place.dimensions; ++i) {
    if (found.sizes[i] != place.sizes[i] || found.strides[i] != place.strides[i]) return false;
  }
  return place.version == kAny || tensor_version(place.handle) == place.version;
}

bool holds(const Sample& sample) { return bits_at(sample.address) == sample.bits; }

template <typename T>
bool every_holds(const std::vector<T>& facts) {
  for (const T& fact : facts) {
    if (!holds(fact)) return false;
  }
  return true;
}

// After a network has run, little of all this is in the caches, and waiting for memory takes most
// of the time: so much that a second thread is worth its start from so many tensors on.
constexpr size_t kManyTensors = 128;

// The facts about Python's objects, for which this thread holds Python's lock, and those about
// memory, which any thread may look at meanwhile.
class Look {
 public:
  explicit Look(const Recorded& recorded) : recorded_(recorded) {}

  bool all_hold() {
    if (recorded_.places.size() >= kManyTensors) {
      torch_parallel_for(
          0, 2, 1, [](int64_t, int64_t, void* look) { static_cast<Look*>(look)->share(); }, this);
    }
    return look_at_objects() && look_at_memory() && look_at_attributes();
  }

 private:
  void share() {
    if (std::this_thread::get_id() == owner_)
      look_at_objects();
    else
      look_at_memory();
  }

  bool look_at_objects() {
    if (!objects_)
      objects_ = every_holds(recorded_.kinds) && every_holds(recorded_.entries) &&
                 every_holds(recorded_.values);
    return *objects_;
  }

  bool look_at_memory() {
    // Samples last, as memory is there to be read only where the tensors are.
    if (!memory_) memory_ = every_holds(recorded_.places) && every_holds(recorded_.samples);
    return *memory_;
  }

  // They may run code of others.
  bool look_at_attributes() { return every_holds(recorded_.attributes); }

  const Recorded& recorded_;
  const std::thread::id owner_ = std::this_thread::get_id();
  std::optional<bool> objects_, memory_;
};

PyObject* hold(PyObject* self, PyObject*) {
  const bool all = Look(recorded_of(self)).all_hold();
  // What cannot be compared is not what it was.
  PyErr_Clear();
  return PyBool_FromLong(all);
}

bool is_dictionary(PyObject* object) {
  if (PyDict_Check(object)) return true;
  PyErr_SetString(PyExc_TypeError, "dictionary is none: expected a dict");
  return false;
}

PyObject* add_entry(PyObject* self, PyObject* arguments) {
  PyObject *dictionary, *name;
  if (!PyArg_ParseTuple(arguments, "OU", &dictionary, &name) || !is_dictionary(dictionary))
    return nullptr;
  Entry entry{dictionary, name, PyDict_GetItemWithError(dictionary, name), 0};
  if (PyErr_Occurred() != nullptr) return nullptr;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  // Names are mostly the same objects; where one is not, it is looked up each time.
  while (PyDict_Next(dictionary, &position, &key, &value) != 0 && key != name)
    entry.position = position;
  Recorded& recorded = recorded_of(self);
  recorded.keep(dictionary);
  recorded.keep(entry.key);
  if (entry.value != nullptr) recorded.keep(entry.value);
  recorded.entries.push_back(entry);
  Py_RETURN_NONE;
}

PyObject* add_attribute(PyObject* self, PyObject* arguments) {
  PyObject *object, *name, *value;
  if (!PyArg_ParseTuple(arguments, "OUO", &object, &name, &value)) return nullptr;
  Recorded& recorded = recorded_of(self);
  for (PyObject* kept : {object, name, value}) recorded.keep(kept);
  recorded.attributes.push_back({object, name, value});
  Py_RETURN_NONE;
}

PyObject* add_kind(PyObject* self, PyObject* object) {
  PyTypeObject* const type = Py_TYPE(object);
  Recorded& recorded = recorded_of(self);
  recorded.keep(object);
  recorded.keep(reinterpret_cast<PyObject*>(type));
  recorded.kinds.push_back({object, type});
  Py_RETURN_NONE;
}

PyObject* add_values(PyObject* self, PyObject* dictionary) {
  if (!is_dictionary(dictionary)) return nullptr;
  Recorded& recorded = recorded_of(self);
  recorded.keep(dictionary);
  Values values{dictionary, {}};
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(dictionary, &position, &key, &value) != 0) {
    recorded.keep(value);
    values.values.push_back(value);
  }
  recorded.values.push_back(std::move(values));
  Py_RETURN_NONE;
}

// An attribute that is a number, or the number that a method without arguments returns; false with
// an error set where there is none.
bool number_of(PyObject* object, const char* name, int64_t* number) {
  PyObject* value = PyObject_GetAttrString(object, name);
  if (value != nullptr && PyCallable_Check(value)) {
    PyObject* const returned = PyObject_CallNoArgs(value);
    Py_DECREF(value);
    value = returned;
  }
  if (value == nullptr) return false;
  *number = static_cast<int64_t>(PyLong_AsLongLong(value));
  Py_DECREF(value);
  return PyErr_Occurred() == nullptr;
}

// Where an object of torch.Tensor has its at::Tensor, which is a pointer to `implementation`; null
// where it has none.
void* find_handle(PyObject* tensor, int64_t size, int64_t implementation) {
  char* const object = reinterpret_cast<char*>(tensor);
  for (int64_t at = sizeof(PyObject); at + static_cast<int64_t>(sizeof(void*)) <= size;
       at += sizeof(void*)) {
    int64_t word;
    std::memcpy(&word, object + at, sizeof word);
    if (word == implementation) return object + at;
  }
  return nullptr;
}

PyObject* add_tensor(PyObject* self, PyObject* arguments) {
  PyObject* tensor;
  int contents;
  if (!PyArg_ParseTuple(arguments, "Op", &tensor, &contents)) return nullptr;
  int64_t size, implementation, data, version;
  if (!number_of(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), "__basicsize__", &size) ||
      !number_of(tensor, "_cdata", &implementation) || !number_of(tensor, "data_ptr", &data) ||
      !number_of(tensor, "_version", &version))
    return nullptr;
  Place place{};
  Layout layout;
  place.handle = find_handle(tensor, size, implementation);
  if (place.handle == nullptr || tensor_version == nullptr || !layout.read(place.handle) ||
      layout.dimensions > kMostDimensions || reinterpret_cast<int64_t>(layout.data) != data ||
      tensor_version(place.handle) != version) {
    PyErr_SetString(PyExc_RuntimeError, "tensor is none of a torch that is known");
    return nullptr;
  }
  place.implementation = *static_cast<void**>(place.handle);
  place.data = layout.data;
  place.version = contents != 0 ? version : kAny;
  place.dimensions = layout.dimensions;
  std::copy_n(layout.sizes, layout.dimensions, place.sizes);
  std::copy_n(layout.strides, layout.dimensions, place.strides);
  recorded_of(self).keep(tensor);
  recorded_of(self).places.push_back(place);
  Py_RETURN_NONE;
}

PyObject* add_sample(PyObject* self, PyObject* arguments) {
  const Py_ssize_t count = PyTuple_Size(arguments);
  if (count < 1) {
    PyErr_SetString(PyExc_TypeError, "sample() has no arguments: expected a tensor and bytes");
    return nullptr;
  }
  PyObject* const tensor = PyTuple_GetItem(arguments, 0);
  int64_t data, size;
  if (!number_of(tensor, "data_ptr", &data) || !number_of(tensor, "nbytes", &size)) return nullptr;
  recorded_of(self).keep(tensor);
  for (Py_ssize_t i = 1; i < count; ++i) {
    const int64_t byte = PyLong_AsLongLong(PyTuple_GetItem(arguments, i));
    if (PyErr_Occurred() != nullptr) return nullptr;
    if (data == 0 || byte < 0 || byte > size - static_cast<int64_t>(sizeof(uint32_t))) {
      PyErr_Format(PyExc_ValueError, "byte is %lld: expected one of four within %lld",
                   static_cast<long long>(byte), static_cast<long long>(size));
      return nullptr;
    }
    const void* const address = reinterpret_cast<const void*>(data + byte);
    recorded_of(self).samples.push_back({address, bits_at(address)});
  }
  Py_RETURN_NONE;
}

PyObject* create(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* const self = PyType_GenericAlloc(type, 0);
  if (self == nullptr) return nullptr;
  reinterpret_cast<Facts*>(self)->recorded = new (std::nothrow) Recorded;
  if (reinterpret_cast<Facts*>(self)->recorded != nullptr) return self;
  Py_DECREF(self);
  return PyErr_NoMemory();
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Recorded* const recorded = reinterpret_cast<Facts*>(self)->recorded;
  // Not there yet while the object is being made.
  if (recorded != nullptr) {
    for (PyObject* object : recorded->references) Py_VISIT(object);
  }
  return 0;
}

// Leaves no fact whose objects may be gone.
int clear(PyObject* self) {
  Recorded* const recorded = reinterpret_cast<Facts*>(self)->recorded;
  if (recorded == nullptr) return 0;
  const Recorded dropped = std::move(*recorded);
  *recorded = Recorded();
  for (PyObject* object : dropped.references) Py_DECREF(object);
  return 0;
}

void destroy(PyObject* self) {
  PyObject_GC_UnTrack(self);
  clear(self);
  delete reinterpret_cast<Facts*>(self)->recorded;
  PyTypeObject* const type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyMethodDef kMethods[] = {
    {"entry", add_entry, METH_VARARGS, "entry(dictionary, key): what it has there, or nothing."},
    {"attribute", add_attribute, METH_VARARGS,
     "attribute(object, name, value): that they are equal."},
    {"kind", add_kind, METH_O, "kind(object): of which class it is."},
    {"values", add_values, METH_O, "values(dictionary): all that it has, in order."},
    {"tensor", add_tensor, METH_VARARGS,
     "tensor(tensor, contents): where it lies and how; with contents, that nobody wrote there."},
    {"sample", add_sample, METH_VARARGS,
     "sample(tensor, *bytes): the four bytes from each on, of a dense tensor whose memory stays."},
    {"hold", hold, METH_NOARGS, "hold(): whether all facts do."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot kSlots[] = {
    {Py_tp_doc, const_cast<char*>("Facts about Python objects and tensors, as they are recorded.")},
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_methods, kMethods},
    {0, nullptr}};

PyType_Spec kFacts = {"threshnet_fast._fingerprint.Facts", sizeof(Facts), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, kSlots};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_fingerprint",
                       "Whether a model is still what it was; see runtime/fingerprint.py.",
                       -1,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__fingerprint() {
  PyObject* const module = PyModule_Create(&kModule);
  if (module == nullptr) return nullptr;
  PyObject* const type = PyType_FromSpec(&kFacts);
  if (type == nullptr || PyModule_AddObject(module, "Facts", type) != 0) {
    Py_XDECREF(type);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
