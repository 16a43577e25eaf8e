package components

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/Masterminds/semver/v3"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// RefKind says how an artifact reference names its artifact.
type RefKind uint8

const (
	// RefName is name or name@constraint: the highest version in the registry that satisfies it.
	RefName RefKind = iota
	// RefDigest is sha256:… : that artifact and no other.
	RefDigest
	// RefPath is a local file or folder, pushed at deploy. Paths begin with ./, ../ or /.
	RefPath
)

// ArtifactRef is a parsed artifact reference.
type ArtifactRef struct {
	Kind       RefKind
	Name       string // RefName
	Constraint string // RefName; "" = the highest released version
	Digest     string // RefDigest, "sha256:" and 64 hex digits
	Path       string // RefPath
}

// digestPrefix begins each digest we write.
const digestPrefix = "sha256:"

// CheckDigest returns nil for "sha256:" and 64 lower-case hex digits.
func CheckDigest(s string) error {
	h, ok := strings.CutPrefix(s, digestPrefix)
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != 32 || strings.ToLower(h) != h {
		return fmt.Errorf("found %q, expected sha256: and 64 lower-case hex digits", shorten(s))
	}
	return nil
}

// ParseArtifactRef reads name, name@constraint, sha256:… or a path. It does not look whether the artifact exists.
func ParseArtifactRef(s string) (ArtifactRef, error) {
	switch {
	case s == "":
		return ArtifactRef{}, errors.New("found nothing, expected name@constraint, sha256:… or the path of a file, which begins with ./ or / there")
	case strings.HasPrefix(s, digestPrefix):
		if err := CheckDigest(s); err != nil {
			return ArtifactRef{}, err
		}
		return ArtifactRef{Kind: RefDigest, Digest: s}, nil
	case strings.HasPrefix(s, "./"), strings.HasPrefix(s, "../"), strings.HasPrefix(s, "/"):
		if strings.ContainsRune(s, 0) || strings.HasSuffix(s, "/") {
			return ArtifactRef{}, fmt.Errorf("found path %q, expected the path of a file", shorten(s))
		}
		return ArtifactRef{Kind: RefPath, Path: s}, nil
	}
	name, constraint, hasConstraint := strings.Cut(s, "@")
	if err := CheckArtifactName(name); err != nil {
		return ArtifactRef{}, err
	}
	if hasConstraint {
		if _, err := semver.NewConstraint(constraint); err != nil || constraint == "" {
			return ArtifactRef{}, fmt.Errorf("found version constraint %q, expected one such as 1.4.0, ^1.2, ~1.2.3 or >=1.2, <2", shorten(constraint))
		}
	}
	return ArtifactRef{Kind: RefName, Name: name, Constraint: constraint}, nil
}

// CheckArtifactName returns nil when s may name an artifact: 1 to 63 of a-z, A-Z, 0-9, "-", "_" and ".", beginning with a letter or digit.
func CheckArtifactName(s string) error {
	ok := s != "" && len(s) <= MaxNameBytes && s[0] != '-' && s[0] != '_' && s[0] != '.'
	for i := range len(s) {
		c := s[i]
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.')
	}
	if !ok {
		return fmt.Errorf("found artifact %q, expected name@constraint, sha256:… or a path that begins with ./ or /; "+
			"a name has 1 to 63 letters, digits, and any of - _ . within", shorten(s))
	}
	return nil
}

// NoArtifactError says that nothing in the registry satisfies a reference, and what is there under the name.
type NoArtifactError struct {
	Ref       string
	Available []string // versions under the name, highest first; or the names, when there is none
	KnownName bool     // Available holds versions
}

func (e *NoArtifactError) Error() string {
	const most = 8
	list := e.Available
	more := ""
	if len(list) > most {
		list, more = list[:most], ", …"
	}
	switch {
	case e.KnownName:
		return fmt.Sprintf("no version satisfies %s: the registry has %s%s", e.Ref, strings.Join(list, ", "), more)
	case len(list) > 0:
		return fmt.Sprintf("the registry has no %s: it has %s%s", e.Ref, strings.Join(list, ", "), more)
	}
	return fmt.Sprintf("the registry has no %s: it is empty; push one with: coppice registry push FILE", e.Ref)
}

// ResolveArtifact pins a reference: a digest to itself, a name and constraint to the highest version that satisfies it (a version with
// a pre-release part only when the constraint names one; a version that is no semver only when named exactly). A path is refused: it
// has to be pushed first. The answer does not depend on the order of available.
func ResolveArtifact(ref string, available []*componentsv1.Artifact) (*componentsv1.Artifact, error) {
	r, err := ParseArtifactRef(ref)
	if err != nil {
		return nil, err
	}
	switch r.Kind {
	case RefPath:
		return nil, fmt.Errorf("%s is a local file: push it first, with: coppice registry push %s", r.Path, r.Path)
	case RefDigest:
		for _, a := range available {
			if a.GetDigest() == r.Digest {
				return a, nil
			}
		}
		return nil, noArtifact(ref, "", available)
	}
	return resolveName(ref, r, available)
}

func resolveName(ref string, r ArtifactRef, available []*componentsv1.Artifact) (*componentsv1.Artifact, error) {
	var constraint *semver.Constraints
	if r.Constraint != "" {
		c, err := semver.NewConstraint(r.Constraint)
		if err != nil {
			return nil, fmt.Errorf("version constraint %q: %w", r.Constraint, err)
		}
		constraint = c
	}
	var best *componentsv1.Artifact
	var bestV *semver.Version
	for _, a := range available {
		if a.GetName() != r.Name {
			continue
		}
		if r.Constraint != "" && a.GetVersion() == r.Constraint {
			return a, nil
		}
		v, err := semver.NewVersion(a.GetVersion())
		if err != nil || (constraint != nil && !constraint.Check(v)) || (constraint == nil && v.Prerelease() != "") {
			continue
		}
		if best == nil || compareArtifacts(v, a, bestV, best) > 0 {
			best, bestV = a, v
		}
	}
	if best == nil {
		return nil, noArtifact(ref, r.Name, available)
	}
	return best, nil
}

// compareArtifacts orders by version, then by when it was pushed, then by digest: total, so that the order of the input is no matter.
func compareArtifacts(v *semver.Version, a *componentsv1.Artifact, w *semver.Version, b *componentsv1.Artifact) int {
	return cmp.Or(v.Compare(w), cmp.Compare(a.GetPushedUnixMs(), b.GetPushedUnixMs()), cmp.Compare(a.GetDigest(), b.GetDigest()))
}

func noArtifact(ref, name string, available []*componentsv1.Artifact) error {
	e := &NoArtifactError{Ref: ref}
	for _, a := range available {
		if name != "" && a.GetName() == name {
			e.KnownName = true
			e.Available = append(e.Available, a.GetVersion())
		}
	}
	if e.KnownName {
		slices.SortFunc(e.Available, compareVersions)
		slices.Reverse(e.Available)
	} else {
		for _, a := range available {
			e.Available = append(e.Available, a.GetName())
		}
		slices.Sort(e.Available)
	}
	e.Available = slices.Compact(e.Available)
	return e
}

// compareVersions orders semver by its rules, and what is none before it, by bytes.
func compareVersions(a, b string) int {
	va, errA := semver.NewVersion(a)
	vb, errB := semver.NewVersion(b)
	switch {
	case errA == nil && errB == nil:
		return cmp.Or(va.Compare(vb), cmp.Compare(a, b))
	case errA == nil:
		return 1
	case errB == nil:
		return -1
	}
	return cmp.Compare(a, b)
}
