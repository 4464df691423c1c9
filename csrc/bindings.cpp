// The Python face of csrc/: checks arguments, releases the GIL, calls one C++ function. Typed in fastdiff/_native.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "crc32c.hpp"
#include "files.hpp"
#include "order.hpp"
#include "permutation.hpp"
#include "prefetcher.hpp"
#include "row_reader.hpp"
#include "staging.hpp"
#include "statistics.hpp"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using CrcArray = py::array_t<std::uint32_t, py::array::c_style>;

constexpr std::uint64_t kMaxPermuted = std::uint64_t{1} << 62;
// How long a consumer waits for a batch that cannot come while it holds others; another thread may still release them.
constexpr double kHeldSeconds = 5.0;
constexpr double kSignalSeconds = 0.1;

Int64Array permute(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch, std::uint64_t start, std::uint64_t count) {
    if (n < 1 || n > kMaxPermuted) throw py::value_error("n must be from 1 to 2^62, got " + std::to_string(n));
    if (start > n || count > n - start)
        throw py::value_error("indices [" + std::to_string(start) + ", " + std::to_string(start) + " + " +
                              std::to_string(count) + ") reach past n = " + std::to_string(n));
    Int64Array out(static_cast<py::ssize_t>(count));
    std::int64_t* to = out.mutable_data();
    {
        py::gil_scoped_release unlocked;
        fastdiff::permute(fastdiff::Permutation(n, seed, epoch), start, static_cast<std::size_t>(count), to);
    }
    return out;
}

std::vector<fastdiff::Extent> make_extents(const Int64Array& fds, const Int64Array& offsets,
                                           const Int64Array& first_rows) {
    if (fds.ndim() != 1 || offsets.ndim() != 1 || first_rows.ndim() != 1 || offsets.size() != fds.size() ||
        first_rows.size() != fds.size() + 1)
        throw py::value_error("fds and offsets must be (E,) and first_rows (E + 1,), got " +
                              std::to_string(fds.size()) + ", " + std::to_string(offsets.size()) + " and " +
                              std::to_string(first_rows.size()));
    std::vector<fastdiff::Extent> extents;
    extents.reserve(static_cast<std::size_t>(fds.size()));
    for (py::ssize_t i = 0; i < fds.size(); ++i) {
        const std::int64_t first = first_rows.at(i), end = first_rows.at(i + 1);
        if (offsets.at(i) < 0 || end < first || (i == 0 && first != 0))
            throw py::value_error("extent " + std::to_string(i) + ": bad offset or first row");
        extents.push_back({static_cast<int>(fds.at(i)), static_cast<std::uint64_t>(offsets.at(i)), first, end});
    }
    return extents;
}

std::optional<fastdiff::Dtype> make_dtype(const std::optional<std::string>& name) {
    if (!name) return std::nullopt;
    if (*name == "bfloat16") return fastdiff::Dtype::kBfloat16;
    if (*name == "float16") return fastdiff::Dtype::kFloat16;
    if (*name == "float32") return fastdiff::Dtype::kFloat32;
    throw py::value_error("dtype must be bfloat16, float16 or float32, got " + *name);
}

// Checksums of files one after another: the first row of each, and one behind the last.
std::vector<fastdiff::FileCrc> make_crc(const std::vector<CrcArray>& sums, const Int64Array& first_rows) {
    if (static_cast<std::size_t>(first_rows.size()) != sums.size() + 1)
        throw py::value_error("there must be one first row more than files");
    std::vector<fastdiff::FileCrc> files;
    for (std::size_t i = 0; i < sums.size(); ++i) {
        const auto at = static_cast<py::ssize_t>(i);
        const std::int64_t first = first_rows.at(at), end = first_rows.at(at + 1);
        if (sums[i].size() != (end - first + fastdiff::kCrcRows - 1) / fastdiff::kCrcRows)
            throw py::value_error("file " + std::to_string(i) + ": wrong number of checksums");
        files.push_back({first, end, sums[i].data()});
    }
    return files;
}

using Crc = std::optional<std::pair<std::vector<CrcArray>, Int64Array>>;

void gather_rows(const Int64Array& fds, const Int64Array& offsets, const Int64Array& first_rows, const Int64Array& rows,
                 py::array out, unsigned n_threads, const Crc& crc) {
    std::vector<fastdiff::Extent> extents = make_extents(fds, offsets, first_rows);
    if (rows.ndim() != 1) throw py::value_error("rows must be 1-D, got " + std::to_string(rows.ndim()) + "-D");
    if (!(out.flags() & py::array::c_style) || !out.writeable())
        throw py::value_error("out must be C-contiguous and writeable");
    if (out.ndim() < 1 || out.shape(0) != rows.shape(0)) throw py::value_error("out.shape[0] must equal len(rows)");
    if (n_threads < 1) throw py::value_error("n_threads must be at least 1");
    const auto n_rows = static_cast<std::size_t>(rows.shape(0));
    if (n_rows == 0) return;
    fastdiff::RowReader reader(std::move(extents), static_cast<std::size_t>(out.nbytes()) / n_rows);
    if (crc) reader.check(make_crc(crc->first, crc->second));
    auto* to = static_cast<std::byte*>(out.mutable_data());
    const std::int64_t* from = rows.data();
    py::gil_scoped_release unlocked;
    fastdiff::gather_rows(reader, from, n_rows, to, n_threads);
}

Int64Array order_rows(const fastdiff::BlockOrder& order, std::uint64_t position, std::uint64_t count) {
    Int64Array out(static_cast<py::ssize_t>(count));
    std::int64_t* to = out.mutable_data();
    {
        py::gil_scoped_release unlocked;
        order.indices(position, static_cast<std::size_t>(count), to);
    }
    return out;
}

// A prefetcher with all it reads from. Batches keep it alive, and with it the memory they are views of.
struct Stream {
    std::unique_ptr<fastdiff::Files> files;
    Crc crc;
    std::optional<Int64Array> table;
    std::unique_ptr<fastdiff::Prefetcher> prefetcher;
    pid_t process = ::getpid();

    Stream() = default;
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() {
        // a forked child has not the threads that the destructor would wait for
        if (forked()) static_cast<void>(prefetcher.release());
    }

    bool forked() const { return ::getpid() != process; }
    void stop() {
        if (!forked()) prefetcher->stop();
    }
};

std::shared_ptr<Stream> make_stream(const Int64Array& fds, const Int64Array& offsets, const Int64Array& first_rows,
                                    std::size_t row_bytes, const fastdiff::BlockOrder& order,
                                    std::optional<Int64Array> table, std::uint64_t start, std::uint64_t count,
                                    std::uint64_t batch_rows, std::size_t n_slots, unsigned n_threads, bool direct,
                                    const std::optional<std::string>& finite, Crc crc) {
    auto stream = std::make_shared<Stream>();
    std::vector<fastdiff::Extent> extents = make_extents(fds, offsets, first_rows);
    stream->files = std::make_unique<fastdiff::Files>(extents, direct);
    stream->crc = std::move(crc);
    stream->table = std::move(table);
    fastdiff::RowReader reader(std::move(extents), row_bytes);
    if (stream->crc) reader.check(make_crc(stream->crc->first, stream->crc->second));
    fastdiff::PrefetchOptions options;
    options.start = start;
    options.count = count;
    options.batch_rows = batch_rows;
    options.n_slots = n_slots;
    options.n_threads = n_threads;
    options.finite = make_dtype(finite);
    options.in_place = direct;
    const std::int64_t* rows = stream->table ? stream->table->data() : nullptr;
    py::gil_scoped_release unlocked;
    stream->prefetcher = std::make_unique<fastdiff::Prefetcher>(std::move(reader), order, rows, options);
    return stream;
}

// Rows of the pool, released when Python lets go of them.
class Batch {
 public:
    Batch(std::shared_ptr<Stream> stream, fastdiff::Prefetcher::View view, std::size_t row_bytes)
        : stream_(std::move(stream)), view_(view), n_bytes_(view.n_rows * row_bytes) {}
    ~Batch() {
        // in a forked child a thread that is not there may hold the lock
        if (!stream_->forked()) stream_->prefetcher->release(view_.slot);
    }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    std::size_t n_rows() const { return view_.n_rows; }
    py::buffer_info buffer() {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(view_.data), static_cast<py::ssize_t>(n_bytes_), false);
    }

 private:
    std::shared_ptr<Stream> stream_;
    fastdiff::Prefetcher::View view_;
    std::size_t n_bytes_;
};

std::unique_ptr<Batch> take(const std::shared_ptr<Stream>& stream, std::size_t n, std::size_t row_bytes) {
    if (stream->forked())
        throw std::runtime_error("the stream belongs to the process that was forked from; make a new one here");
    for (double waited = 0;; waited += kSignalSeconds) {
        std::optional<fastdiff::Prefetcher::View> view;
        try {
            py::gil_scoped_release unlocked;
            view = stream->prefetcher->take(n, kSignalSeconds);
        } catch (const fastdiff::HeldTooLong&) {
            if (waited >= kHeldSeconds) throw;
        }
        if (view) return std::make_unique<Batch>(stream, *view, row_bytes);
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

// The bytes of any C-contiguous array.
std::pair<const std::byte*, std::size_t> bytes_of(const py::array& data) {
    if (!(data.flags() & py::array::c_style)) throw py::value_error("data must be C-contiguous");
    return {static_cast<const std::byte*>(data.data()), static_cast<std::size_t>(data.nbytes())};
}

std::int64_t first_nonfinite_row(const py::array& data, const std::string& dtype) {
    const auto [bytes, n_bytes] = bytes_of(data);
    if (data.ndim() < 1) throw py::value_error("data must have rows");
    const auto n_rows = static_cast<std::size_t>(data.shape(0));
    if (n_rows == 0) return -1;
    const fastdiff::Dtype kind = *make_dtype(dtype);
    const std::size_t row_bytes = n_bytes / n_rows;
    if (row_bytes % (kind == fastdiff::Dtype::kFloat32 ? 4 : 2) != 0)
        throw py::value_error("a row of " + std::to_string(row_bytes) + " bytes does not hold whole values");
    py::gil_scoped_release unlocked;
    const std::size_t found = fastdiff::first_nonfinite(bytes, n_rows, row_bytes, kind);
    return found == n_rows ? -1 : static_cast<std::int64_t>(found);
}

void stage_rows(const py::array& rows, const py::array& to, const py::array& sums, std::size_t first,
                std::size_t block_rows) {
    const auto [bytes, n_bytes] = bytes_of(rows);
    if (rows.ndim() < 1) throw py::value_error("rows must have rows");
    const auto n_rows = static_cast<std::size_t>(rows.shape(0));
    if (!(to.flags() & py::array::c_style) || !to.writeable() || static_cast<std::size_t>(to.nbytes()) < n_bytes)
        throw py::value_error("to must be C-contiguous and writeable, with room for " + std::to_string(n_bytes) + " bytes");
    if (block_rows < 1) throw py::value_error("block_rows must be at least 1");
    const auto n_sums = static_cast<std::size_t>(sums.size());
    if (!sums.dtype().equal(py::dtype::of<std::uint32_t>()) || !(sums.flags() & py::array::c_style) ||
        !sums.writeable() || first > n_sums * block_rows || n_rows > n_sums * block_rows - first)
        throw py::value_error("sums must be C-contiguous, writeable uint32 with a place for each block");
    if (n_rows == 0) return;
    auto* into = static_cast<std::byte*>(py::array(to).mutable_data());
    auto* crcs = static_cast<std::uint32_t*>(py::array(sums).mutable_data());
    py::gil_scoped_release unlocked;
    fastdiff::stage_rows(bytes, n_rows, n_bytes / n_rows, into, crcs, first, block_rows);
}

// A float64 array that is written in place.
double* in_place(const py::array& array, std::size_t size, const char* name) {
    if (!array.dtype().equal(py::dtype::of<double>()) || !(array.flags() & py::array::c_style) || !array.writeable() ||
        static_cast<std::size_t>(array.size()) != size)
        throw py::value_error(std::string(name) + " must be a C-contiguous, writeable float64 array of " +
                              std::to_string(size) + " values");
    return static_cast<double*>(py::array(array).mutable_data());
}

std::uint64_t add_statistics(const py::array& data, const std::string& dtype, std::uint64_t n, const py::array& mean,
                             const py::array& m2, const py::array& norms) {
    const auto [bytes, n_bytes] = bytes_of(data);
    if (dtype != "bfloat16" && dtype != "float32")
        throw py::value_error("dtype must be bfloat16 or float32, got " + dtype);
    if (norms.size() < 1 || mean.size() % norms.size() != 0 || mean.size() < norms.size())
        throw py::value_error("mean must hold as many values for each model");
    const auto n_models = static_cast<std::size_t>(norms.size()), width = static_cast<std::size_t>(mean.size());
    const std::size_t row_bytes = width * (dtype == "float32" ? 4 : 2);
    if (n_bytes % row_bytes != 0)
        throw py::value_error(std::to_string(n_bytes) + " bytes are no rows of " + std::to_string(row_bytes));
    fastdiff::RowStatistics statistics{n, in_place(mean, width, "mean"), in_place(m2, width, "m2"),
                                       in_place(norms, n_models, "norms")};
    {
        py::gil_scoped_release unlocked;
        const std::size_t n_rows = n_bytes / row_bytes, d_model = width / n_models;
        if (dtype == "float32")
            fastdiff::add_rows(statistics, reinterpret_cast<const float*>(bytes), n_rows, n_models, d_model);
        else
            fastdiff::add_rows(statistics, reinterpret_cast<const std::uint16_t*>(bytes), n_rows, n_models, d_model);
    }
    return statistics.n;
}

py::array_t<float> row_norms(const py::array& data, const std::string& dtype, std::size_t n_models,
                             std::size_t d_model) {
    const auto [bytes, n_bytes] = bytes_of(data);
    if (dtype != "bfloat16" && dtype != "float32")
        throw py::value_error("dtype must be bfloat16 or float32, got " + dtype);
    const std::size_t row_bytes = n_models * d_model * (dtype == "float32" ? 4 : 2);
    if (row_bytes == 0 || n_bytes % row_bytes != 0)
        throw py::value_error(std::to_string(n_bytes) + " bytes are no rows of " + std::to_string(row_bytes));
    const std::size_t n_rows = n_bytes / row_bytes;
    py::array_t<float> out({static_cast<py::ssize_t>(n_rows), static_cast<py::ssize_t>(n_models)});
    float* to = out.mutable_data();
    {
        py::gil_scoped_release unlocked;
        if (dtype == "float32")
            fastdiff::row_norms(reinterpret_cast<const float*>(bytes), n_rows * n_models, d_model, to);
        else
            fastdiff::row_norms(reinterpret_cast<const std::uint16_t*>(bytes), n_rows * n_models, d_model, to);
    }
    return out;
}

std::uint32_t crc32c(const py::array& data, std::uint32_t value, bool tables) {
    const auto [bytes, n_bytes] = bytes_of(data);
    py::gil_scoped_release unlocked;
    return fastdiff::crc32c(value, bytes, n_bytes, tables);
}

py::array_t<std::uint32_t> crc32c_blocks(const py::array& data, std::size_t block_bytes, bool tables) {
    const auto [bytes, n_bytes] = bytes_of(data);
    if (block_bytes < 1) throw py::value_error("block_bytes must be at least 1");
    py::array_t<std::uint32_t> out(static_cast<py::ssize_t>((n_bytes + block_bytes - 1) / block_bytes));
    std::uint32_t* to = out.mutable_data();
    {
        py::gil_scoped_release unlocked;
        fastdiff::crc32c_blocks(bytes, n_bytes, block_bytes, to, tables);
    }
    return out;
}

void raise_os_error(int error) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
}

// Python builds the messages, which need the files' paths; the arguments are the numbers.
void register_errors(py::module_& m) {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> read_error, corrupt, nonfinite, held;
    read_error.call_once_and_store_result([&m] { return py::object(py::exception<fastdiff::ReadError>(m, "ReadError")); });
    corrupt.call_once_and_store_result([&m] { return py::object(py::exception<fastdiff::CorruptRows>(m, "CorruptRows")); });
    nonfinite.call_once_and_store_result(
        [&m] { return py::object(py::exception<fastdiff::NonFiniteRow>(m, "NonFiniteRow")); });
    held.call_once_and_store_result(
        [&m] { return py::object(py::exception<fastdiff::HeldTooLong>(m, "HeldTooLong", PyExc_RuntimeError)); });
    py::register_exception_translator([](std::exception_ptr pointer) {
        const auto raise = [](auto& type, const py::object& args) {
            PyErr_SetObject(type.get_stored().ptr(), args.ptr());
        };
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const fastdiff::ReadError& e) {
            raise(read_error, py::make_tuple(e.what(), e.extent, e.offset, e.wanted, e.got, e.error));
        } catch (const fastdiff::CorruptRows& e) {
            raise(corrupt, py::make_tuple(e.what(), e.row, e.end_row));
        } catch (const fastdiff::NonFiniteRow& e) {
            raise(nonfinite, py::make_tuple(e.what(), e.row));
        } catch (const fastdiff::HeldTooLong& e) {
            raise(held, py::make_tuple(e.what()));
        } catch (const std::system_error& e) {
            raise_os_error(e.code().value());
        }
    });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled parts of fastdiff. Use them through fastdiff.store, not directly.";
    register_errors(m);

    m.def("permute", &permute, py::arg("n"), py::arg("seed"), py::arg("epoch"), py::arg("start"), py::arg("count"),
          "Order v1 (csrc/permutation.hpp) of indices [start, start + count) of [0, n).");
    m.def("gather_rows", &gather_rows, py::arg("fds"), py::arg("offsets"), py::arg("first_rows"), py::arg("rows"),
          py::arg("out").noconvert(), py::kw_only(), py::arg("n_threads") = 1, py::arg("crc") = py::none(),
          "Read row rows[i] of the extents into out[i].");
    m.def("first_nonfinite_row", &first_nonfinite_row, py::arg("data"), py::arg("dtype"),
          "The first row of an array that holds NaN or infinity, or -1.");
    m.def("stage_rows", &stage_rows, py::arg("rows"), py::arg("to").noconvert(), py::arg("sums").noconvert(),
          py::arg("first"), py::arg("block_rows"),
          "Copy rows into a buffer, and sum each block of a file in which they follow row `first`, in place.");
    m.def("add_statistics", &add_statistics, py::arg("data"), py::arg("dtype"), py::arg("n"),
          py::arg("mean").noconvert(), py::arg("m2").noconvert(), py::arg("norms").noconvert(),
          "Count rows into mean [M, D], M2 [M, D] and the sum of norms [M] of n rows, in place; returns the new n.");
    m.def("row_norms", &row_norms, py::arg("data"), py::arg("dtype"), py::arg("n_models"), py::arg("d_model"),
          "The L2 norm of each model's part of rows [n, M, D]: (n, M) float32.");
    m.def("crc32c", &crc32c, py::arg("data"), py::arg("value") = 0, py::kw_only(), py::arg("tables") = false,
          "CRC-32C of an array's bytes, continuing from `value`.");
    m.def("crc32c_blocks", &crc32c_blocks, py::arg("data"), py::arg("block_bytes"), py::kw_only(),
          py::arg("tables") = false, "One CRC-32C per block of an array's bytes.");
    m.def("crc32c_has_hardware", &fastdiff::crc32c_has_hardware, "True if the processor has the crc32 instruction.");
    m.def(
        "why_not_direct",
        [](const Int64Array& fds, const Int64Array& offsets, const Int64Array& first_rows, std::size_t row_bytes) {
            return fastdiff::why_not_direct(make_extents(fds, offsets, first_rows), row_bytes);
        },
        py::arg("fds"), py::arg("offsets"), py::arg("first_rows"), py::arg("row_bytes"),
        "Why the page cache cannot be bypassed, or None if it can.");
    m.def(
        "cached_share",
        [](const Int64Array& fds, const Int64Array& offsets, const Int64Array& first_rows, std::size_t row_bytes) {
            return fastdiff::cached_share(make_extents(fds, offsets, first_rows), row_bytes);
        },
        py::arg("fds"), py::arg("offsets"), py::arg("first_rows"), py::arg("row_bytes"),
        "Share of a sample of rows that the page cache holds.");

    py::class_<fastdiff::BlockOrder>(m, "BlockOrder", "Which row comes when (csrc/order.hpp).")
        .def(py::init<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>(),
             py::arg("n"), py::arg("seed"), py::arg("block_rows"), py::arg("pool_rows"), py::arg("rank") = 0,
             py::arg("world_size") = 1)
        .def("rows", &order_rows, py::arg("position"), py::arg("count"),
             "Indices at positions [position, position + count) of the endless stream.")
        .def("rows_in_epoch", &fastdiff::BlockOrder::rows_in_epoch, py::arg("epoch"))
        .def("left_in_window", &fastdiff::BlockOrder::left_in_window, py::arg("position"),
             "Rows from a position of the stream to the end of its window (block order).")
        .def_property_readonly("n_windows", &fastdiff::BlockOrder::n_windows)
        .def_property_readonly("largest_window", &fastdiff::BlockOrder::largest_window)
        .def_property_readonly("smallest_window", &fastdiff::BlockOrder::smallest_window);

    py::class_<Batch>(m, "Batch", py::buffer_protocol(), "Rows in the pool of a stream, held until it is deleted.")
        .def("__len__", &Batch::n_rows)
        .def_buffer(&Batch::buffer);

    py::class_<Stream, std::shared_ptr<Stream>>(m, "Stream", "Shuffled rows, read ahead (csrc/prefetcher.hpp).")
        .def(py::init(&make_stream), py::arg("fds"), py::arg("offsets"), py::arg("first_rows"), py::kw_only(),
             py::arg("row_bytes"), py::arg("order"), py::arg("table"), py::arg("start"), py::arg("count"),
             py::arg("batch_rows"), py::arg("n_slots"), py::arg("n_threads"), py::arg("direct"), py::arg("finite"),
             py::arg("crc"))
        .def("take", &take, py::arg("n"), py::arg("row_bytes"),
             "The next rows, at most n; fewer where a window or the stream ends.")
        .def("stop", &Stream::stop, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("pool",
                               [](const Stream& s) {
                                   const auto& pool = *s.prefetcher->pool();
                                   return std::make_pair(reinterpret_cast<std::uintptr_t>(pool.data()), pool.size());
                               });
}
