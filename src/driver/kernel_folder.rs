//! A folder of kernels over those of the binary (`--kernels-dir`): edit, run, no rebuild.
//!
//! It is laid out as `kernels/` and may hold as little as one file of one
//! family: kernel files and headers that it lacks are the binary's own. For a
//! GPU those are embedded; the SIMT layer links one library of all kernels, so
//! there they come from the source tree that the binary was built from.
//!
//! What is compiled is kept in a folder of the user's alone: it is loaded into
//! this process, so nobody else may put anything there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::embedded::HEADERS;
use super::toolchain::{
    SimtSources, SimtVariant, ToolError, build_simt_from, hash_of, kernel_sources, module_name, read,
};

/// The folder of compiled kernels: `kiln/kernels` in the user's cache.
pub fn cache() -> Result<PathBuf, ToolError> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let user = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    let ours = user.unwrap_or_else(std::env::temp_dir).join("kiln");
    let folder = ours.join("kernels");
    // Whoever owns the outer one could put another in the inner one's place.
    make_private(&ours)?;
    make_private(&folder)?;
    Ok(folder)
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> ToolError {
    let path = path.to_owned();
    move |source| ToolError::File { path, source }
}

/// Makes `folder`, or makes sure that it is ours and that nobody else may write there.
#[cfg(unix)]
fn make_private(folder: &Path) -> Result<(), ToolError> {
    use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};

    let refuse = |reason: &str| ToolError::Setting {
        what: "the folder of compiled kernels".into(),
        value: folder.display().to_string(),
        reason: format!("{reason}; remove it, or name a cache folder of your own in XDG_CACHE_HOME"),
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(file_error(folder))?;
    let found = fs::symlink_metadata(folder).map_err(file_error(folder))?;
    if !found.is_dir() {
        return Err(refuse("is no folder"));
    }
    // A new file belongs to this user.
    let ours = tempfile::tempfile_in(folder).and_then(|file| file.metadata()).map_err(file_error(folder))?;
    if found.uid() != ours.uid() {
        return Err(refuse("belongs to another user"));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(file_error(folder))?;
    }
    Ok(())
}

#[cfg(not(unix))]
fn make_private(folder: &Path) -> Result<(), ToolError> {
    fs::create_dir_all(folder).map_err(file_error(folder))
}

/// Kernel files of the folder; an error if there are none.
pub fn sources(kernels: &Path) -> Result<Vec<PathBuf>, ToolError> {
    let found = kernel_sources(kernels)?;
    if found.is_empty() {
        return Err(ToolError::Setting {
            what: "the folder of kernels".into(),
            value: kernels.display().to_string(),
            reason: "holds no kernel; it must be laid out as kernels/, such as gemm/gemm_sm80.cu".into(),
        });
    }
    Ok(found)
}

/// The folder of headers: that of `kernels`, or one in `cache` with the binary's own for those that it lacks.
pub fn headers(kernels: &Path, cache: &Path) -> Result<PathBuf, ToolError> {
    let own = kernels.join("include");
    if HEADERS.iter().all(|(name, _)| own.join(name).is_file()) {
        return Ok(own);
    }
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    for (name, text) in HEADERS {
        let edited = own.join(name);
        let text = if edited.is_file() { read(&edited)? } else { text.as_bytes().to_vec() };
        all.push(((*name).to_owned(), text));
    }
    if own.is_dir() {
        for path in super::toolchain::read_dir(&own)?.into_iter().filter(|path| path.is_file()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !all.iter().any(|(known, _)| *known == name) {
                all.push((name, read(&path)?));
            }
        }
    }
    let merged = cache.join(format!("include-{:016x}", hash_of(&all)));
    fs::create_dir_all(&merged).map_err(file_error(&merged))?;
    for (name, text) in &all {
        let path = merged.join(name);
        if fs::read(&path).ok().as_ref() != Some(text) {
            fs::write(&path, text).map_err(file_error(&path))?;
        }
    }
    Ok(merged)
}

/// Compiles the SIMT library with the kernels of a folder in place of the binary's; of those what the build script
/// made is taken as it is. `built` is the library that it made.
pub fn build_simt_over(
    kernels: &Path,
    built: Option<&Path>,
    variant: SimtVariant,
) -> Result<PathBuf, ToolError> {
    let cache = cache()?;
    // Objects are known by their flags, and these name folders.
    let kernels = &fs::canonicalize(kernels).map_err(file_error(kernels))?;
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let layer = [kernels, &base].map(|folder| folder.join("simt"));
    let layer = layer.into_iter().find(|folder| folder.join("simt.cpp").is_file());
    let layer = layer.ok_or_else(|| ToolError::Setting {
        what: "the folder of kernels".into(),
        value: kernels.display().to_string(),
        reason: "has no folder simt, and this binary's sources are not here: name a whole kernels folder"
            .into(),
    })?;
    // The folder's own come first: a mistake in them is then told first.
    let mut all = sources(kernels)?;
    if base.is_dir() {
        let own: Vec<String> = all.iter().map(|path| module_name(path)).collect();
        all.extend(kernel_sources(&base)?.into_iter().filter(|path| !own.contains(&module_name(path))));
    }
    let has_headers = kernels.join("include").is_dir() || !base.join("include").is_dir();
    let headers = if has_headers { headers(kernels, &cache)? } else { base.join("include") };
    let built = built.and_then(Path::parent).map(Path::to_owned);
    build_simt_from(&SimtSources { layer, headers, kernels: all, built }, &cache, variant)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    #[test]
    fn the_folder_of_compiled_kernels_is_the_users_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/kiln");
        make_private(&folder).unwrap();
        let mode = || fs::metadata(&folder).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o700);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        make_private(&folder).unwrap();
        assert_eq!(mode(), 0o700, "others may not write there any more");
        let link = dir.path().join("link");
        symlink(&folder, &link).unwrap();
        assert!(make_private(&link).unwrap_err().to_string().contains("is no folder"));
        // Only root can give a folder away.
        if chown(&folder, Some(65_534), None).is_ok() {
            let error = make_private(&folder).unwrap_err().to_string();
            assert!(error.contains("belongs to another user; remove it"), "{error}");
        }
    }

    #[test]
    fn headers_that_a_folder_lacks_are_the_binarys() {
        let dir = tempfile::tempdir().unwrap();
        let (kernels, cache) = (dir.path().join("kernels"), dir.path().join("cache"));
        fs::create_dir_all(kernels.join("include")).unwrap();
        fs::write(kernels.join("include/tile.cuh"), "// edited\n").unwrap();
        fs::write(kernels.join("include/mine.cuh"), "// new\n").unwrap();
        let merged = headers(&kernels, &cache).unwrap();
        let text = |name: &str| fs::read_to_string(merged.join(name)).unwrap();
        assert_eq!((text("tile.cuh").as_str(), text("mine.cuh").as_str()), ("// edited\n", "// new\n"));
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        assert_eq!(text("ptx.cuh"), fs::read_to_string(own.join("include/ptx.cuh")).unwrap());
        assert_eq!(headers(&own, &cache).unwrap(), own.join("include"), "a whole folder is taken as it is");
        assert!(sources(&kernels).unwrap_err().to_string().contains("holds no kernel"));
    }
}
