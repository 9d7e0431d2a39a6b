#include "image_list.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <sys/stat.h>

#include "failure.h"
#include "files.h"

namespace cada::seg::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char *SUFFIXES[] = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"};

/* Length of the image suffix; 0 without one. Bytes, not characters: names may be any bytes. */
size_t suffix_length(const std::string &name) {
  for (const std::string suffix : SUFFIXES) {
    if (name.size() < suffix.size()) continue;
    const bool same = std::equal(suffix.rbegin(), suffix.rend(), name.rbegin(), [](char a, char b) {
      return a == (b >= 'A' && b <= 'Z' ? b + 32 : b);
    });
    if (same) return suffix.size();
  }
  return 0;
}

using Identity = std::pair<dev_t, ino_t>;

Identity identity(const fs::path &path) {
  struct stat found {};
  if (stat(path.c_str(), &found) != 0) return {};
  return {found.st_dev, found.st_ino};
}

/* Every visible image below a folder. Links to folders come after the real ones, in order of their
 * path; each real folder is read once, so that a loop or a second way adds nothing. */
class Walk {
public:
  explicit Walk(const std::string &root) {
    std::error_code ignored;
    fs::path above = fs::canonical(root, ignored);
    while (above.has_parent_path() && above != above.parent_path()) {
      above = above.parent_path();
      seen_.insert(identity(above));
    }
    read(root, "");
    while (!links_.empty()) {
      const auto first = *links_.begin();
      links_.erase(links_.begin());
      if (!seen_.count(identity(first.second))) read(first.second, first.first);
    }
  }
  std::vector<ImageRef> images;

private:
  void read(const fs::path &folder, const std::string &prefix) {
    if (!seen_.insert(identity(folder)).second && !prefix.empty()) return;
    std::error_code error;
    fs::directory_iterator entries(folder, error);
    for (; !error && entries != fs::directory_iterator(); entries.increment(error)) add(*entries, prefix);
    if (error) {
      fail(CADA_SEG_FAILED, "cannot list folder ", folder.string(), ": ", error.message(),
           "; its images would be missing");
    }
  }

  void add(const fs::directory_entry &entry, const std::string &prefix) {
    const std::string name = entry.path().filename().string();
    if (name[0] == '.') return;
    std::error_code ignored; /* a link that leads to itself is no folder */
    if (entry.is_directory(ignored)) {
      const std::string below = prefix + name + "/";
      if (entry.is_symlink(ignored)) links_.emplace(below, entry.path());
      else read(entry.path(), below);
    } else if (suffix_length(name) != 0) {
      images.push_back({entry.path().string(), prefix + name});
    }
  }

  std::set<Identity> seen_;
  std::map<std::string, fs::path> links_;
};

/* A list's entry without '.', '..' and a leading '/': it stays where it is put. */
std::string inside(const std::string &name) {
  std::string found;
  for (const fs::path &part : fs::path(name).lexically_normal()) {
    const std::string text = part.string();
    if (text.empty() || text == "/" || text == "//" || text == "." || text == "..") continue;
    found += (found.empty() ? "" : "/") + text;
  }
  return found.empty() ? "unnamed" : found;
}

std::vector<ImageRef> from_list(const std::string &source) {
  const Bytes content = read_file(source, "list");
  std::string text(content.begin(), content.end());
  if (text.find('\0') != std::string::npos) {
    fail(CADA_SEG_USAGE, source, " holds NUL bytes: it is no list of paths (one a line), no folder "
         "and has no image suffix");
  }
  if (text.rfind("\xef\xbb\xbf", 0) == 0) text.erase(0, 3);
  std::vector<ImageRef> found;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string line = text.substr(at, end - at);
    at = end + 1;
    while (!line.empty() && line.back() == '\r') line.pop_back();
    const size_t first = line.find_first_not_of(" \t\v\f\r");
    if (first == std::string::npos || line[first] == '#') continue;
    found.push_back({(fs::path(source).parent_path() / line).string(), inside(line)});
  }
  if (found.empty()) fail(CADA_SEG_USAGE, "no image in list ", source);
  return found;
}

} // namespace

std::vector<ImageRef> find_images(const std::string &source) {
  std::error_code error;
  const fs::file_status status = fs::status(source, error);
  if (error || !fs::exists(status)) {
    fail(CADA_SEG_USAGE, "no images: ", source, " cannot be opened (",
         error ? error.message() : "No such file or directory", ")");
  }
  std::vector<ImageRef> found;
  if (fs::is_directory(status)) {
    found = Walk(source).images;
    if (found.empty()) {
      fail(CADA_SEG_USAGE, "no image in folder ", source, ": expected names ending in .png .jpg "
           ".jpeg (.bmp .tif .tiff .webp are found and rejected); names with a leading dot are "
           "skipped");
    }
  } else if (!fs::is_regular_file(status)) {
    fail(CADA_SEG_USAGE, source, " is neither a folder nor a list of paths");
  } else if (suffix_length(source) != 0) {
    found = {{source, fs::path(source).filename().string()}};
  } else {
    found = from_list(source);
  }
  std::stable_sort(found.begin(), found.end(), [](const ImageRef &a, const ImageRef &b) {
    return a.relative < b.relative; /* std::string compares as unsigned bytes */
  });
  return found;
}

std::string output_stem(const std::string &relative) {
  const std::string stem = relative.substr(0, relative.size() - suffix_length(relative));
  return stem.empty() || stem.back() == '/' ? relative : stem;
}

void check_output_names(const std::vector<ImageRef> &images) {
  std::map<std::string, const ImageRef *> taken;
  for (const ImageRef &image : images) {
    const auto [at, fresh] = taken.emplace(output_stem(image.relative) + ".png", &image);
    if (!fresh) {
      fail(CADA_SEG_USAGE, at->second->path, " and ", image.path, " would both be written to ",
           at->first, "; rename one, or give a list that names each once");
    }
  }
  for (const ImageRef &image : images) {
    for (size_t at = image.relative.rfind('/'); at != std::string::npos && at > 0;
         at = image.relative.rfind('/', at - 1)) {
      const auto parent = taken.find(image.relative.substr(0, at));
      if (parent != taken.end()) {
        fail(CADA_SEG_USAGE, "the output of ", parent->second->path, " is the file ",
             parent->first, ", but ", image.path, " needs a folder of that name; rename one");
      }
    }
  }
}

void check_out_not_inside(const std::string &source, const std::string &out) {
  std::error_code error;
  if (!fs::is_directory(source, error)) return;
  const fs::path folder = fs::canonical(source, error), target = fs::weakly_canonical(out, error);
  const auto end = std::mismatch(folder.begin(), folder.end(), target.begin(), target.end());
  if (end.first == folder.end()) {
    fail(CADA_SEG_USAGE, "OUT ", out, " lies inside the input folder ", source, ", and its labels "
         "would be taken for images the next time; give a folder outside it");
  }
}

} // namespace cada::seg::cli
